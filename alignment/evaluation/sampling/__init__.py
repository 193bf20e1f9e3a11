"""Answers drawn from a policy.

`answer` says how answers are drawn and what one is, `choice` how the next token is chosen, `loop` draws a batch,
`ways` finds out how a model's cache may be used, `local` is the engine that draws with the model in this process,
`server` the one that asks a server, `drift` says how far that one is from the policy, `store` keeps what was drawn, and
`presets` are a model's own generation settings.
"""
