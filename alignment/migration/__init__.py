"""Recipes made of the files of other tools: a table of keys for each tool, and what the keys mean together."""
