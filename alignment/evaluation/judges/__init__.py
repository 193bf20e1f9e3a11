"""Judges of answers: a score for one answer, or a preference between two.

`base` says what a judge is asked and what it answers; each other module is one kind of judge, or what several of them
need. `card` measures a judge, and `making` makes the one that a configuration names.
"""
