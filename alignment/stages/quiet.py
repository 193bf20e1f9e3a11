"""What libraries say about themselves would bury what a run says."""

from __future__ import annotations

import logging
import os
import warnings

import transformers


def quieten_libraries() -> None:
    """Only errors of the libraries of models are printed from here on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("bitsandbytes", "peft", "trl", "accelerate", "httpx", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|peft|bitsandbytes)\b")
