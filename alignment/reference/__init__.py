"""What the policy is compared with: per-token log-probs of the policy as it was at the start or the last refresh.

`cached` takes them from the `store` that all runs share; `live` computes them with a `frozen` copy of the policy.
"""
