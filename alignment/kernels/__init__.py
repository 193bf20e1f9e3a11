"""Faster ways to compute the same: attention over shared prompts, matrix products, layers. Imports no other wing."""
