"""The data of a run: read, mixed, checked for the stage that uses them, tokenised, and found again by later starts.

`prepare` does all of it, `mixture` for several sources; `prepared` keeps large sets in the cache.
"""
