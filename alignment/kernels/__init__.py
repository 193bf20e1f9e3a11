"""Faster ways to compute the same: attention, linear layers, gated MLPs, norms, rotary positions, matrix products.

Every kernel checks whether it can run here, and the model's own code runs where it cannot. Imports no other wing.
"""
