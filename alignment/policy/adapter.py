"""LoRA adapters: attach one to a model, load a saved one, and list what it adds to the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from alignment.config.schema import AdapterConfig
from alignment.errors import UserError
from alignment.kernels.patch import patch_layers
from alignment.policy.load import one_line


def attach_adapter(model: nn.Module, config: AdapterConfig | None, seed: int) -> nn.Module:
    """Attach a fresh LoRA adapter, or with `config=None` make all weights trainable (full fine-tuning).

    Raises:
        UserError: peft refuses the settings.
    """
    if config is None:
        patch_layers(model.requires_grad_(True))
        return model
    from peft import LoraConfig, get_peft_model

    target = config.target_modules[0] if config.target_modules == ["all-linear"] else config.target_modules
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=target,
        init_lora_weights=True if config.init == "default" else config.init,  # type: ignore[arg-type]
        use_rslora=config.rslora,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same adapter whatever was drawn before, in a resumed run too
        try:
            adapted = get_peft_model(model, lora)
        except (ValueError, TypeError) as error:
            raise UserError(f"adapter: {one_line(error)}") from error
    patch_layers(adapted)
    return adapted


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Attach a saved adapter, trainable. If the model has one of the same form, that one takes the saved weights."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), model.active_adapter, is_trainable=True, torch_device=str(model.device))
        return model
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    patch_layers(adapted)
    return adapted


def has_adapter(model: nn.Module) -> bool:
    """Whether the model carries a peft adapter."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def lora_updates(model: nn.Module) -> Iterator[tuple[str, float, Tensor, Tensor]]:
    """(layer, scaling, A, B) of every active, non-zero LoRA update, on linear layers and on embeddings."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for key in layer.active_adapters:
            if key in layer.lora_A:
                a, b = layer.lora_A[key].weight, layer.lora_B[key].weight
            elif key in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A[key], layer.lora_embedding_B[key]
            else:
                continue
            if a.any() and b.any():
                yield name, layer.scaling[key], a, b  # type: ignore[misc]


def starts_at_base(model: nn.Module) -> bool:
    """Whether the model computes the same with its adapter off: all updates are zero, and the base was not edited."""
    if not has_adapter(model):
        return False
    if any(config.init_lora_weights not in (True, "gaussian") for config in model.peft_config.values()):
        return False
    return next(lora_updates(model), None) is None


def check_adapter_gradients(model: nn.Module) -> None:
    """After a backward pass, check that every trainable tensor has a gradient.

    Raises:
        UserError: some have none, for example because a fused kernel reads a layer's weight and ignores its adapter.
    """
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise UserError(
            f"{len(missing)} trainable tensors received no gradient (the first: {missing[0]}): take these layers out "
            f"of adapter.target_modules, because their adapter would never learn."
        )
