"""The policy's own answers and what they are worth: sampling, the rule judge, KL, intervals."""
