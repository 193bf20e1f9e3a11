"""Layouts: which columns a record has, what they mean, and how it becomes a row.

`recognition` knows the layouts. `comparisons` with `verdicts`, `ratings` and `columns` read the other names and shapes
of the field.
"""
