"""Preference alignment of language models: DPO and its variants on a QLoRA policy, from one command."""

__version__ = "0.1.0"
