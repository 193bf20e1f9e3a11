"""Imported before torch, lets threads that wait for each other spin for some microseconds only and then sleep.

By default GNU's OpenMP spins for about a millisecond. A step is made of thousands of short parallel regions, so on a
busy machine a thread spins through the time that the one it waits for needs. 1000 rounds are 5 to 12 % slower than that
on a quiet machine, where sleeping at once is 12 to 35 % slower, and on a busy one ten times faster:
tests/bench/PROFILE.md.

OpenMP reads the environment when torch loads it. `OMP_WAIT_POLICY` or `GOMP_SPINCOUNT` of your own stay as they are.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
