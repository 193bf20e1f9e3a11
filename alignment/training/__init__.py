"""The preference loop: the trainer, its objective, its callbacks, its memory plan."""
