"""What libraries say about themselves would bury what a run says."""

from __future__ import annotations

import logging
import os
import warnings

import transformers

from alignment.errors import without_passwords


class _Record(logging.LogRecord):
    """A line of the log; libraries put the addresses of mirrors and proxies into theirs."""

    def getMessage(self) -> str:
        """The line without the passwords in its addresses."""
        return without_passwords(super().getMessage())


def quieten_libraries() -> None:
    """Only errors of the libraries of models are printed from here on, and no line of the log holds a password."""
    logging.setLogRecordFactory(_Record)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("bitsandbytes", "peft", "trl", "accelerate", "httpx", "datasets", "gguf"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|peft|bitsandbytes)\b")
