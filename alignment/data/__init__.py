"""From files to groups of tokens."""
