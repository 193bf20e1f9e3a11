"""From a model and groups of tokens to the log-prob of every completion token."""
