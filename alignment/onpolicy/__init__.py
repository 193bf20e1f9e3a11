"""Preference data from the policy's own answers.

`pairs` makes groups of token ids of sampled answers and their scores, `counts` says what became of them, and `held_out`
keeps the prompts of the evaluation out.
"""
