"""What judgements say of policies, as pure numbers: win rates, their intervals and what may bias them.

`clusters` counts answers that are not independent, `length_control` takes the length of answers out of a win rate,
`bradley_terry` ranks several policies, `prediction_powered` mends a judge's rate by the labels of people, and
`resampling` draws prompts anew, and `power` plans how many items or seeds a difference takes.
"""
