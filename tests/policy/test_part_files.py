"""Parts that ranks have written: whoever reads rows finds them, whichever number of ranks and of files has them."""

import pytest
import torch
from safetensors.torch import load_file

from alignment.policy import part_files
from alignment.policy.part_files import PartFiles, write_part


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_rows_are_those_of_the_whole(ranks, tmp_path, monkeypatch):
    """A matrix, a vector with fewer entries than ranks, 16 bits, in files of at most 40 bytes."""
    monkeypatch.setattr(part_files, "_BYTES", 40)
    whole = {"a": torch.arange(14.0).reshape(7, 2), "b": torch.tensor([3, -1]).bfloat16(), "ab.c": torch.ones(5)}
    for rank in reversed(range(ranks)):
        parts = []
        for name, tensor in whole.items():
            rows = -(-len(tensor) // ranks)
            parts.append((name, tensor[rank * rows : (rank + 1) * rows]))
        write_part(tmp_path, rank, iter(parts))
    files = PartFiles(tmp_path)
    assert files and "a" in files and "c" not in files
    assert files.below("a") == ["", "b.c"]
    for name, tensor in whole.items():
        assert files.rows(name).equal(tensor) and files.rows(name).dtype == tensor.dtype
        for start in range(len(tensor) + 2):
            for stop in range(start, len(tensor) + 2):
                found = files.rows(name, slice(start, stop))
                assert found.equal(tensor[start:stop]), (name, start, stop)
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in tmp_path.iterdir()]
    assert len(sizes) > ranks or ranks > 2
    assert all(size <= 40 or size == whole["a"].nbytes for size in sizes)
    with pytest.raises(KeyError):
        files.rows("c")


def test_a_folder_of_another_kind_has_no_parts(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert not PartFiles(tmp_path)
