"""What the files of an offline W&B run hold."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def read_wandb(folder: Path) -> list[Any]:
    """Records of an offline run: a LevelDB log with a 7-byte file header, each record a protobuf message."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # as at the end of the process: the service writes the file out
    (path,) = folder.glob("*.wandb")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts, found = 7, b"", []
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def history(records: list[Any]) -> list[dict[str, Any]]:
    found = []
    for record in records:
        if record.HasField("history"):
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            found.append({key: value for key, value in row.items() if key not in ("_timestamp", "_runtime", "_step")})
    return found


def of_kind(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.HasField(kind)]
