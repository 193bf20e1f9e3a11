"""Every setting of a run: `schema` types and checks them, `compose` fills them with Hydra from recipes and overrides.

`arguments` checks the whole command line before anything is loaded. Only this wing and `run.py` know Hydra.
"""
