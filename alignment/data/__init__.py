"""From files and hub sets to validated rows, and from rows to token groups."""
