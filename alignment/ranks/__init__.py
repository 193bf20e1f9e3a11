"""The processes of one run: who they are, how they start, and how the first one shares its work with the others.

Rank 0 does what a single process does: it reads, decides, steps the optimizer and writes. The others follow it. They
hold the same policy, wait for a task, do their share of it and reply.
"""
