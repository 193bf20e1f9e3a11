"""The models: load a base model, attach an adapter, fingerprint, merge.

`load` and `adapter` make the policy, `identity` hashes what it computes, `layers` sets checkpointing and dropout, and
`merge` writes it as one plain model. `wheel_model` and `tiny_model` are models that need no network.
"""
