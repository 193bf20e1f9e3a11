"""From a model and groups to per-token log-probs.

A layout turns groups into micro-batches, the model scores them, and `TokenScores` names the results. Prompts are shared
between completions where the model computes the same with it.
"""
