"""Preference alignment of language models: DPO and its variants on a QLoRA policy, from one command."""

from importlib import metadata

try:
    __version__ = metadata.version("alignment")
except metadata.PackageNotFoundError:  # read from a folder that nobody has installed
    __version__ = "0+unknown"
