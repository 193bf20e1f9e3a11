"""The chain of a run, in `chain`: SFT, the preference stage, answers to held-out prompts, report.

`reuse` and `store` keep results for other runs; `sweep` and `cohorts` run the members of a sweep.
"""
