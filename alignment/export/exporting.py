"""What one call of the command makes, in order, each part whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from alignment.config.schema import Dtype
from alignment.errors import UserError
from alignment.export.gguf_check import Probed, check_gguf, probe, probe_prompts
from alignment.export.gguf_file import FOR_CONVERTER, TYPES, GGUFContents, require_type, unknown_model, write_gguf
from alignment.export.ollama import modelfile
from alignment.export.opened import Opened
from alignment.export.vllm import Served, largest_rank, not_served, serve_script
from alignment.files import atomic_write_bytes, atomic_write_text, file_digest, file_lock, replace_folder, to_json
from alignment.policy.load import read_shape, resolve_dtype
from alignment.policy.merge import load_plain
from alignment.policy.source import ADAPTER_FILE
from alignment.stages.export import export_whole

log = logging.getLogger(__name__)

FORMS = ("adapter", "merged", "gguf", "vllm", "ollama")
_RECORD = "export.json"
_LOCK, _PARTIAL = ".export.lock", ".partial-"
_CONVERTER = "convert_hf_to_gguf.py"


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for.

    Attributes:
        forms: of `FORMS`.
        types: of GGUF files.
        out: folder of all that is made.
        converter: llama.cpp's own, or its folder; None: files are written here.
    """

    forms: tuple[str, ...]
    types: tuple[str, ...]
    out: Path
    converter: Path | None


class Export:
    """One policy on its way into the forms that are asked for.

    Args:
        opened: the policy.
        order: what is asked for.

    Raises:
        UserError: a form that this policy cannot have.
    """

    def __init__(self, opened: Opened, order: Order) -> None:
        self.opened = opened
        self.order = order
        self._settings = opened.adapter
        self._refuse()
        self._record: dict[str, Any] = {}

    # What cannot be done

    def _refuse(self) -> None:
        """Refuse before anything is loaded what would fail after it."""
        opened, forms = self.opened, self.order.forms
        if self.order.out.is_relative_to(opened.saved):
            raise UserError(f"out={self.order.out} is inside the policy that is exported: choose another folder.")
        if opened.adapter is None and "adapter" in forms:
            raise UserError(f"to=adapter: {opened.saved} is a whole model, without an adapter: choose to=merged.")
        served = [form for form in forms if form in ("gguf", "vllm", "ollama")]
        if served and opened.rewards:
            raise UserError(
                f"to={served[0]}: {opened.saved} is a reward model, which writes no text: choose to=merged, which "
                f"transformers loads as a sequence classification model."
            )
        if self._wants_gguf:
            self._refuse_gguf()
        if "ollama" in forms:
            self._modelfile()

    def _refuse_gguf(self) -> None:
        """Refuse a type or a model that no GGUF file is made of."""
        for kind in self.order.types:
            require_type(kind)
        if self.order.converter is not None:
            if other := [kind for kind in self.order.types if kind not in FOR_CONVERTER]:
                raise UserError(f"type={other[0]}: llama.cpp's converter makes {', '.join(FOR_CONVERTER)} alone.")
            if not self._converter.is_file():
                raise UserError(f"converter={self.order.converter}: there is no {_CONVERTER}.")
            return
        asked = self.opened.asked
        shape = read_shape(asked.source.base, asked.config.model)
        if (problem := unknown_model(shape, asked.tokenizer)) is not None:
            raise UserError(
                f"to=gguf: {self.opened.name} is written by llama.cpp's own converter alone, because {problem}: give "
                f"it by converter=PATH, a checkout of llama.cpp with {_CONVERTER}."
            )

    def _require_free(self) -> None:
        """Refuse to write over what no export of this policy has made."""
        forms, out = self.order.forms, self.order.out
        wanted = {"adapter": self._wants_adapter, "merged": self._wants_merged}
        wanted |= {"vllm.sh": "vllm" in forms, "Modelfile": "ollama" in forms}
        wanted |= {self._gguf_path(kind).name: self._wants_gguf for kind in self.order.types}
        for name, is_wanted in wanted.items():
            if is_wanted and name not in self._record["exports"] and (out / name).exists():
                raise UserError(
                    f"out={out} holds {name} already, which no export of this policy has made: choose another folder."
                )

    def _known(self) -> dict[str, Any]:
        """What the folder tells of earlier exports of this policy."""
        path = self.order.out / _RECORD
        if not path.exists():
            return {"policy": self.opened.contents, "exports": {}}
        try:
            found = json.loads(path.read_bytes())
            if found["policy"] == self.opened.contents and isinstance(found["exports"], dict):
                return found
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise UserError(
            f"out={self.order.out} holds exports of another policy, or its {_RECORD} is damaged: choose another "
            f"folder, or empty it."
        )

    # Facts

    @property
    def _wants_adapter(self) -> bool:
        forms = self.order.forms
        return "adapter" in forms or ("vllm" in forms and self._unserved is None)

    @property
    def _wants_merged(self) -> bool:
        forms = self.order.forms
        return "merged" in forms or ("vllm" in forms and self._unserved is not None)

    @property
    def _wants_gguf(self) -> bool:
        return not {"gguf", "ollama"}.isdisjoint(self.order.forms)

    @property
    def _converter(self) -> Path:
        path = self.order.converter
        assert path is not None
        return path / _CONVERTER if path.is_dir() else path

    @cached_property
    def _unserved(self) -> str | None:
        """Why vLLM gets the merged model: what it is, in words; None where it gets the adapter."""
        return "a whole model" if self._settings is None else not_served(self._settings)

    @cached_property
    def _generation(self) -> dict[str, Any]:
        """Settings of generation: those of the policy's model, with the tokens that end its answers."""
        from transformers import GenerationConfig

        asked, adapted = self.opened.asked, self._settings is not None
        source = asked.source.base if adapted else str(self.opened.saved)
        revision = asked.config.model.revision if adapted else None
        try:
            own = GenerationConfig.from_pretrained(source, revision=revision or "main")
            settings = own.to_diff_dict()
        except (OSError, ValueError):  # it has none
            settings = {}
        left_out = ("transformers_version", "_from_model_config")
        kept = {key: value for key, value in settings.items() if key not in left_out and value is not None}
        return kept | {"eos_token_id": list(asked.stops)}

    def _gguf_path(self, kind: str) -> Path:
        return self.order.out / f"{self.opened.name}-{kind}.gguf"

    def _modelfile(self) -> str:
        asked = self.opened.asked
        return modelfile(self._gguf_path(self.order.types[0]), asked.tokenizer, asked.stops, self._generation)

    # Making

    def make(self) -> list[Path]:
        """Make all that is asked for; returns the paths.

        Raises:
            UserError: the folder holds exports of another policy, or something that no export has made.
        """
        with file_lock(self.order.out / _LOCK, f"Another export writes into {self.order.out}: waiting for its end."):
            self._record = self._known()
            self._require_free()
            for left in self.order.out.glob(f"{_PARTIAL}*"):  # by an export that was killed
                shutil.rmtree(left)
            return self._made()

    def _made(self) -> list[Path]:
        forms, out = self.order.forms, self.order.out
        made: list[Path] = []
        if self._wants_adapter:
            made.append(self._keep(self._adapter(), {"base": self.opened.asked.source.base}))
        if self._wants_merged or self._wants_gguf:
            made += self._weights(self._wants_merged)
        if "vllm" in forms:
            made.append(self._keep(self._vllm(), {}))
        if "ollama" in forms:
            path = out / "Modelfile"
            atomic_write_text(path, self._modelfile())
            made.append(self._keep(path, {"file": self._gguf_path(self.order.types[0]).name}))
        return made

    def _keep(self, path: Path, facts: dict[str, Any]) -> Path:
        """Note a part that is whole now."""
        self._record["exports"][path.name] = facts
        atomic_write_bytes(self.order.out / _RECORD, to_json(self._record, 2) + b"\n")
        return path

    @contextmanager
    def _room(self) -> Iterator[Path]:
        """A folder for what is not whole yet."""
        folder = Path(tempfile.mkdtemp(dir=self.order.out, prefix=_PARTIAL))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _adapter(self) -> Path:
        """The adapter with its tokenizer, and with the settings of generation, which peft does not save."""
        folder = self.order.out / "adapter"
        with self._room() as room:
            new = room / folder.name
            shutil.copytree(self.opened.saved, new)
            settings = json.loads((new / ADAPTER_FILE).read_bytes())
            settings["base_model_name_or_path"] = self.opened.asked.source.base
            atomic_write_bytes(new / ADAPTER_FILE, to_json(settings, 2) + b"\n")
            self.opened.asked.tokenizer.save_pretrained(new)
            atomic_write_bytes(new / "generation_config.json", to_json(self._generation, 2) + b"\n")
            replace_folder(new, folder)
        log.info("Adapter in %s, for the base %s.", folder, self.opened.asked.source.base)
        return folder

    def _weights(self, wants_merged: bool) -> list[Path]:
        """The merged model and the GGUF files, with one load of the policy."""
        made: list[Path] = []
        with self._room() as room:
            plain = room / "plain"
            if self._settings is None:
                plain = self.opened.saved
                if wants_merged:
                    new = room / "merged"
                    shutil.copytree(plain, new)
                    replace_folder(new, self.order.out / "merged")
                    made.append(self._keep(self.order.out / "merged", {"dtype": "as trained"}))
            else:
                policy, asked = self.opened.load(), self.opened.asked
                prompts = probe_prompts(asked.tokenizer)
                dtype = resolve_dtype(asked.config.export.dtype, asked.device)
                if wants_merged:
                    folder = self.order.out / "merged"
                    arguments = asked.tokenizer, folder, asked.device, prompts, asked.stops
                    made.append(self._keep(folder, export_whole(policy, self.opened.made, *arguments)))
                if self._wants_gguf and wants_merged and dtype is torch.float32:
                    plain = self.order.out / "merged"
                elif self._wants_gguf:
                    log.info("The adapter is merged in float32, for the GGUF file alone.")
                    config = replace(asked.config, quantization=None)
                    config = replace(config, export=replace(config.export, dtype=Dtype.float32))
                    source = replace(self.opened.made, config=config)
                    export_whole(policy, source, asked.tokenizer, plain, asked.device, prompts, asked.stops)
                del policy
            if self._wants_gguf:
                made += self._gguf_files(plain, room)
        return made

    def _gguf_files(self, plain: Path, room: Path) -> Iterator[Path]:
        """A file of each type, made of the same weights."""
        asked = self.opened.asked
        probed = None
        for kind in self.order.types:
            model: Any = load_plain(str(plain), asked.config, torch.float32, asked.device, own=False)
            probed = probed or probe(model, probe_prompts(asked.tokenizer), asked.device)
            yield self._gguf(plain, model, probed, kind, room)

    def _gguf(self, plain: Path, model: Any, probed: Probed, kind: str, room: Path) -> Path:
        """One file, read back and compared."""
        asked, path = self.opened.asked, self._gguf_path(kind)
        new = room / path.name
        if self.order.converter is None:
            contents = GGUFContents(model, asked.tokenizer, asked.stops, self._generation, self.opened.name)
            write_gguf(contents, kind, new)
        else:
            self._convert(plain, kind, new)
        facts: dict[str, Any] = {"type": kind, "bytes": new.stat().st_size, "digest": file_digest(new)}
        try:
            read = check_gguf(new, model, probed, asked.device)
        except (ValueError, NotImplementedError, KeyError) as error:
            if self.order.converter is None or isinstance(error, UserError):
                raise
            log.warning("%s was not compared: transformers does not read such files back (%s).", path.name, error)
        else:
            facts |= read.to_dict()
            log.info(
                "GGUF file %s: read back and compared. Rounding moves next-token log-probs by %.2g nats on average; "
                "%.1f %% of the likeliest tokens stay.",
                path,
                read.drift,
                100 * read.same_tokens,
            )
        os.replace(new, path)
        return self._keep(path, facts)

    def _convert(self, plain: Path, kind: str, path: Path) -> None:
        """Have llama.cpp's converter write a file."""
        words = [sys.executable, str(self._converter), str(plain), "--outfile", str(path), "--outtype", kind]
        log.info("Converting by %s ...", self._converter)
        ended = subprocess.run([*words, "--model-name", self.opened.name], capture_output=True, text=True)
        if ended.returncode or not path.is_file():
            said = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()[-1]
            raise UserError(f"converter={self.order.converter} ended with status {ended.returncode} and said: {said}")

    def _vllm(self) -> Path:
        """The script that serves the policy."""
        opened, out, settings = self.opened, self.order.out, self._settings
        asked = opened.asked
        config, is_adapter = asked.config, self._unserved is None
        if self._unserved is not None and settings is not None:
            log.info("vLLM takes no %s beside its base, so it gets the merged model.", self._unserved)
        folder = "./adapter" if is_adapter else "./merged"
        data = config.last_data
        served = Served(
            name=self.opened.name,
            model=asked.source.base if is_adapter else folder,
            revision=config.model.revision if is_adapter else None,
            adapter=folder if is_adapter else None,
            rank=largest_rank(settings) if is_adapter and settings is not None else 0,
            tokenizer=folder,
            dtype=str(resolve_dtype(config.model.dtype, asked.device)).removeprefix("torch."),
            length=data.max_length,
            packed=config.quantization is not None,
            code=config.model.trust_remote_code,
        )
        path = out / "vllm.sh"
        atomic_write_text(path, serve_script(served))
        path.chmod(0o755)
        return path


def types_of(given: str | None) -> tuple[str, ...]:
    """The types that `type=` names; f16 without it.

    Raises:
        UserError: one that is not made here.
    """
    found = tuple(dict.fromkeys(kind for kind in (given or "f16").lower().strip("[]").split(",") if kind))
    for kind in found:
        require_type(kind)
    return found or TYPES[1:2]
