"""The policy's own answers and what they are worth.

`sampling` draws answers, `judges` judge them, `kl` measures the KL to the start of the stage, `intervals` has the
confidence intervals of shares and win rates, `statistics` what many judgements say of policies, and `endpoint` calls
servers of models.
"""
