"""The benchmark of quantisers and adapters: its numbers on a small model, and its tables."""

import pytest
import torch
from transformers import AutoTokenizer

from tests.bench import quantization
from tests.bench.quantization import (
    MARKERS,
    QUANTISERS,
    bits_per_weight,
    markdown,
    measure_errors,
    measure_trainings,
    put_into_docs,
)
from tests.helpers.wide_model import save_wide_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_folder):
    """A model as wide as a block, with the tokenizer of single bytes."""
    folder = save_wide_model(tmp_path_factory.mktemp("wide"), vocab_size=258)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


@pytest.mark.matrix
def test_the_errors_of_the_quantisers(folder, monkeypatch):
    """Bits as the formats have them; float32 has no error; ICQ by MSE less than NF4, in weights and in outputs."""
    monkeypatch.setattr(quantization, "source", lambda name: quantization.BUNDLED)
    found = measure_errors(3, str(folder))
    assert list(found) == list(QUANTISERS)
    bits = {name: row["bits_per_weight"] for name, row in found.items()}
    assert bits["float32"] == 32 and bits["NF4"] == 4.5
    small = 32 / (64 * 256)  # the last group of a small layer is not full
    assert bits["NF4, double"] == pytest.approx(4 + 8 / 64 + small, abs=0.02)
    assert bits["ICQ by MSE"] == bits["ICQ by entropy"] == pytest.approx(4 + 2 * (8 / 64 + small), abs=0.03)
    exact, nf4, mse = (found[name] for name in ("float32", "NF4, double", "ICQ by MSE"))
    assert exact["weight_error"] == exact["output_error"] == exact["drift"] == 0
    for error in ("weight_error", "output_error"):
        assert 0 < mse[error] < nf4[error]
    assert mse["drift"] > 0 and mse["perplexity"] != nf4["perplexity"]


def test_bits_of_a_layer_that_is_not_packed():
    """Those of its dtype."""
    assert bits_per_weight([torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)]) == 16


def test_what_was_measured_before_is_not_measured_again(monkeypatch):
    """An interrupted benchmark goes on with the seed and the variant that it had come to."""
    done = []
    monkeypatch.setattr(
        quantization, "train", lambda overrides, seed, *_: done.append((*overrides, seed)) or {"loss": 1}
    )
    found = {"a": [{"loss": 0.5}]}
    steps = measure_trainings({"a": ("x",), "b": ("y",)}, 3, [0, 1], None, found)
    next(steps)
    assert found == {"a": [{"loss": 0.5}], "b": [{"loss": 1}]}
    list(steps)
    assert done == [("y", 0), ("x", 1), ("y", 1)] and found["a"] == [{"loss": 0.5}, {"loss": 1}]


def test_the_tables_go_between_the_markers(tmp_path):
    """Everything around them stays."""
    run = {"loss": 0.5, "accuracy": 0.75, "margin": 2.0, "tokens_per_second": 1234.0}
    result = {
        "dpo": {"NF4": [run, run | {"loss": 0.7}]},
        "depth": {"all": {"seconds": 2.0}, "upper": {"seconds": 1.0}},
        "settings": {"steps": 3, "seeds": [0, 1]},
        "machine": {"cpu": "some CPU", "cores": 2},
        "versions": {"torch": "2", "bitsandbytes": "0", "peft": "0"},
        "date": "2026-01-01",
        "minutes": 1.0,
    }
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    put_into_docs(markdown(result), page)
    text = page.read_text()
    assert text.startswith(f"before\n{MARKERS[0]}\n") and text.endswith(f"{MARKERS[1]}\nafter\n") and "old" not in text
    assert "| NF4 | 0.6000 (0.5000, 0.7000) | 0.750 (0.750, 0.750) |" in text and "| upper | 1.00 | 50% |" in text
