"""The chain of a run: SFT, the preference stage, answers, and results that other runs reuse."""
