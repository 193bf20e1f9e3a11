"""The preference loop: from tokenised groups, a loss and a reference to a trained policy.

`trainer` is the loop, `objective` the loss with its inputs, `cohort` several trainings on one base. The rest plans
memory, orders the steps, stops early and measures.
"""
