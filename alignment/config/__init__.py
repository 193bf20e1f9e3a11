"""Every setting of a run: its schema, its composition by Hydra, and the checks that come before anything is loaded."""
