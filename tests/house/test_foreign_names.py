"""What the code needs of other libraries' own names: a version that lacks one fails here, by that name.

The lowest versions in pyproject.toml are true as long as this module, and with it the suite, passes with them too.
"""

import ast
import importlib
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

import alignment
from alignment.training.stage_trainer import StageTrainer
from alignment.training.trainer import PreferenceTrainer

PACKAGE = Path(alignment.__file__).parent
LIBRARIES = {
    "accelerate", "bitsandbytes", "datasets", "huggingface_hub", "hydra", "omegaconf", "peft", "safetensors",
    "tokenizers", "torch", "transformers", "trl",
}  # fmt: skip


def imported_names() -> list[str]:
    """`module:name` of all that the package imports from the libraries, inside functions too."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "trackers" and importlib.util.find_spec(path.stem) is None:
            continue  # of a service that is not installed
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
                found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return sorted(found)


def test_the_imports_are_found():
    assert {"torch.utils.checkpoint:checkpoint", "trl:SFTTrainer"} < set(imported_names())


def test_imported_names_are_there():
    for name in imported_names():
        module, attribute = name.split(":")
        if not hasattr(importlib.import_module(module), attribute):
            importlib.import_module(f"{module}.{attribute}")


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize("trainer", [StageTrainer, PreferenceTrainer])
def test_overridden_methods_take_what_the_trainer_passes(trainer):
    for name, method in vars(trainer).items():
        theirs = getattr(Trainer, name, None)
        if not inspect.isfunction(method) or theirs is None or name == "__init__":
            continue
        ours = inspect.signature(method).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours.values()):
            assert parameters(theirs) <= set(ours), name


@pytest.mark.parametrize(
    "name",
    [
        *("_get_grad_norm", "_save_checkpoint", "create_accelerator_and_postprocess", "create_scheduler"),
        *("floating_point_ops", "log", "training_step"),
    ],
)
def test_the_trainer_calls_what_is_overridden(name):
    """An override that is no longer called would leave a run without its checks, and nothing would say so."""
    assert name in vars(Trainer) and name in {**vars(StageTrainer), **vars(PreferenceTrainer)}
    assert f"self.{name}(" in inspect.getsource(Trainer)


def test_the_trainer_sums_the_loss_where_the_check_looks():
    assert "self._tr_loss += " in inspect.getsource(Trainer)


def test_accelerate_unscales_before_it_clips_and_steps_by_its_scaler():
    """The places where a scaler of ours stands in."""
    assert "self.unscale_gradients()" in inspect.getsource(Accelerator.clip_grad_norm_)
    assert "self.scaler.scale(loss).backward" in inspect.getsource(Accelerator.backward)
    assert "scaler=scaler" in inspect.getsource(Accelerator.prepare_optimizer)
    assert "self.accelerator.scaler" in inspect.getsource(Trainer._save_scaler)


def test_arguments_of_the_trainer():
    assert {"num_training_steps"} <= parameters(TrainingArguments.get_warmup_steps)


def test_models_change_their_attention():
    assert callable(PreTrainedModel._can_set_attn_implementation)
    assert {"attn_implementation"} <= parameters(PreTrainedModel.set_attn_implementation)
    assert isinstance(PreTrainedConfig._attn_implementation, property)


def test_layers_run_again_through_the_function_that_is_set():
    assert "_gradient_checkpointing_func(" in inspect.getsource(GradientCheckpointingLayer)


def test_flash_attention_of_variable_length():
    lengths = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    forward, backward = (
        getattr(torch.ops.aten, name).default._schema
        for name in ("_flash_attention_forward", "_flash_attention_backward")
    )
    names, backward_names = ([argument.name for argument in schema.arguments] for schema in (forward, backward))
    assert names[:10] == ["query", "key", "value", *lengths, "return_debug_mask"]
    assert backward_names[:14] == [
        "grad_out", "query", "key", "value", "out", "logsumexp", *lengths, "rng_state", "unused",
    ]  # fmt: skip
    assert [result.name for result in forward.returns][:4] == ["output", "softmax_logsumexp", "rng_state", "unused"]
    assert {"scale", "window_size_left", "window_size_right"} <= set(names) & set(backward_names)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_products_by_onednn():
    assert {"default", "binary"} <= set(torch.ops.mkldnn._linear_pointwise.overloads())


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("_scaled_dot_product_flash_attention_for_cpu", {"is_causal", "scale"}),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", {"logsumexp", "is_causal", "scale"}),
        ("_unsafe_view", {"size"}),
    ],
)
def test_operations_of_torch(name, needed):
    operation = getattr(torch.ops.aten, name).default
    assert needed <= {argument.name for argument in operation._schema.arguments}


def test_products_of_bitsandbytes():
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import QuantState, dequantize_4bit

    assert {"A", "B", "quant_state", "bias"} <= parameters(matmul_4bit)
    assert {"A", "quant_state"} <= parameters(dequantize_4bit)
    parts = {"absmax", "shape", "code", "blocksize", "quant_type", "dtype", "offset", "state2"}
    assert parts <= parameters(QuantState)
