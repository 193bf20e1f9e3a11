"""The policy's own answers and what they are worth.

`generate` samples answers, `judge` scores them by rules, `kl` measures the KL to the start of the stage, and
`intervals` has the confidence intervals of shares and win rates.
"""
