"""Adapters: attach one to a model, load a saved one, go on from one."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignment.config.adapters import RESIDUAL_INITS, AdapterConfig
from alignment.errors import UserError
from alignment.kernels.experts import stand_ins
from alignment.kernels.patch import patch_layers
from alignment.policy.adapter_kinds import peft_config, plain_name, updates
from alignment.policy.adapter_names import chosen_targets, require_modules, with_targets
from alignment.policy.adapter_start import StartSources, start_adapter
from alignment.policy.float_weights import FloatWeights
from alignment.policy.load import one_line
from alignment.policy.residual_start import edit_base
from alignment.policy.saved_adapter import OR_NEW, read_adapter

log = logging.getLogger(__name__)


def attach_adapter(
    model: nn.Module,
    config: AdapterConfig | None,
    seed: int,
    sources: StartSources = StartSources(),  # noqa: B008
    modules: Sequence[str] | None = None,
) -> nn.Module:
    """Attach a fresh adapter, or with `config=None` make all weights trainable (full fine-tuning).

    Args:
        model: with every weight frozen.
        config: of the adapter.
        seed: of what is drawn at random.
        sources: what some inits need.
        modules: without an adapter, the only modules that train; None: all.

    Raises:
        UserError: the settings fit no module of the model, or peft refuses them.
    """
    if config is None:
        for part in [model] if modules is None else map(model.get_submodule, modules):
            part.requires_grad_(True)
        patch_layers(model)
        return model
    adapted = _attached(model, config, seed)
    start_adapter(adapted, config, seed, sources)
    _finish(adapted)
    return adapted


def _attached(model: nn.Module, config: AdapterConfig, seed: int, empty: bool = False) -> nn.Module:
    """The model with an adapter as peft starts it; `empty` leaves the adapter's tensors on the meta device."""
    from peft import get_peft_model

    device = next(model.parameters()).device
    config = with_targets(model, config)  # before the experts have stand-ins: the model may be run
    gpus = [device] if device.type == "cuda" else []  # the default is every GPU that torch sees
    with stand_ins(model), torch.random.fork_rng(devices=gpus):
        require_modules(model, config)
        settings = peft_config(config, *chosen_targets(model, config))
        torch.manual_seed(seed)  # the same adapter whatever was drawn before, in a resumed run too
        try:
            adapted = get_peft_model(model, settings, low_cpu_mem_usage=empty)
        except (ValueError, TypeError, NotImplementedError) as error:
            if "ParamWrapper" in str(error) and "lora_dropout" in str(error):
                raise UserError(
                    f"adapter.dropout={config.dropout}: an adapter of a mixture's experts has no dropout: set "
                    f"adapter.dropout=0, or name layers without the experts in adapter.target_modules."
                ) from error
            if "Mamba-based" in str(error):
                raise UserError(
                    f"adapter.target_modules=[{','.join(config.target_modules)}]: the state-space blocks of a "
                    f"{model.config.model_type} read the weights of conv1d and out_proj themselves, so an adapter "
                    f"there would never learn: set adapter.target_modules=auto, or name other layers."
                ) from error
            raise UserError(f"adapter: {one_line(error)}") from error
        except AttributeError as error:
            if config.init != "orthogonal":
                raise
            raise UserError(  # peft asks the experts for a weight of their own
                "adapter.init=orthogonal knows linear layers alone, and adapter.target_modules names experts of a "
                "mixture: leave these out, or set adapter.init=default."
            ) from error
    _require_plain_rows(adapted)
    return adapted


def _require_plain_rows(adapted: nn.Module) -> None:
    """Refuse OFT on a layer whose input has four dimensions: peft takes it for an image."""
    for name, module in adapted.named_modules():
        if hasattr(module, "expand_kv") and hasattr(getattr(module, "kv_b_proj", None), "oft_R"):
            layer = f"{name.rpartition('model.')[2]}.kv_b_proj"
            raise UserError(
                f"adapter=oft knows layers of token vectors alone, and {layer} is given heads: leave it out by "
                f"adapter.exclude_modules=[kv_b_proj], or choose another adapter."
            )


def _finish(adapted: nn.Module) -> None:
    """What is left to do once an adapter has its weights."""
    _show_ends(adapted)
    patch_layers(adapted)


def _show_ends(adapted: nn.Module) -> None:
    """Let peft's wrappers around embeddings and a tied head say what others ask these for."""
    from peft.tuners.lora import Embedding
    from peft.utils.other import TrainableTokensWrapper

    for module in adapted.modules():
        if isinstance(module, TrainableTokensWrapper | Embedding):
            inner: Any = module.original_module if hasattr(module, "original_module") else module.get_base_layer()
            known = ("num_embeddings", "embedding_dim", "in_features", "out_features", "bias")
            vars(module).update({name: getattr(inner, name) for name in known if hasattr(inner, name)})


def empty_adapter(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """A model on the meta device with the adapter that a run would attach: what trains, in its shapes.

    Args:
        model: on the meta device; a part of what is returned.
        config: of the adapter. Which tokens train does not matter here, only how many.
    """
    tokens = list(range(len(config.trainable_tokens)))
    adapted = _attached(model, replace(config, trainable_tokens=tokens, init="default"), 0, empty=True)
    _show_ends(adapted)
    return adapted


def continue_adapter(
    model: nn.Module,
    folder: Path,
    config: AdapterConfig,
    seed: int,
    sources: StartSources = StartSources(),  # noqa: B008
) -> nn.Module:
    """Attach an adapter with the weights of a saved one, after `require_same_form`, to train these further.

    Raises:
        UserError: the saved adapter has other layers than the settings choose, or weights beside its own.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    saved = read_adapter(folder)
    adapted = _attached(model, config, seed)
    if saved.residual is not None:
        edit_base(adapted, saved.residual, sources.weights)
    elif config.init_family in RESIDUAL_INITS:  # one of peft's own, whose base it edits each time that it loads it
        start_adapter(adapted, config, seed, sources)
    weights = saved.weights or load_peft_weights(str(folder), device="cpu")
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    known = {key: weights[key] for key in weights.keys() & own.keys()}
    beside = weights.keys() - own.keys()
    base = adapted.state_dict()
    different = {key: t.shape for key, t in known.items()} != {key: t.shape for key, t in own.items()}
    if different or any(plain_name(key) is None for key in beside):
        layers = sorted({_layer(key) for key in weights if plain_name(key) is None})
        raise UserError(
            f"model.name: the policy continues the adapter in {folder}, which has adapted other layers than "
            f"adapter.target_modules, or spectrum where it is set, chooses: set those of the adapter "
            f"({', '.join(layers)}), {OR_NEW}."
        )
    for key in beside:
        # peft saves embeddings and head beside an adapter of theirs; they must be those of the base.
        if key not in base or not torch.equal(weights[key].to(base[key]), base[key]):
            raise UserError(
                f"model.name: the adapter in {folder} has weights beside its updates ({key}): merge it into its base "
                f"first, and set model.name to the merged model."
            )
    set_peft_model_state_dict(adapted, known)
    _finish(adapted)
    return adapted


def _layer(key: str) -> str:
    """The last name of the module that a saved tensor belongs to."""
    return re.split(r"\.(?:lora|vera|oft|boft)_", key)[0].rpartition(".")[2]


def load_adapter(model: nn.Module, folder: Path, weights: FloatWeights | None = None) -> nn.Module:
    """Attach a saved adapter, trainable. If the model has one of the same form, that one takes the saved weights.

    Args:
        model: the base, in place.
        folder: of the adapter.
        weights: the base's own weights, for an adapter that began with a part of a base in 4 bits.

    Raises:
        UserError: it cannot be read.
    """
    from peft import PeftModel, get_peft_model
    from peft.utils.save_and_load import set_peft_model_state_dict

    saved = read_adapter(folder)
    saved.settings.task_type = "CAUSAL_LM"  # also of a reward model, whose file is for classification models
    if isinstance(model, PeftModel):
        if saved.weights is not None:
            set_peft_model_state_dict(model, saved.weights)
        else:
            model.load_adapter(str(folder), model.active_adapter, is_trainable=True, torch_device=str(model.device))
        return model
    adapted: nn.Module
    with stand_ins(model):
        if saved.residual is None:
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=saved.settings)
        else:
            saved.settings.inference_mode = False
            adapted = get_peft_model(model, saved.settings)
    if saved.residual is not None:
        set_peft_model_state_dict(adapted, saved.weights)
        edit_base(adapted, saved.residual, weights)
    _finish(adapted)
    return adapted


def add_adapter(model: nn.Module, folder: Path, name: str) -> nn.Module:
    """Attach one more saved adapter, frozen, under a name of its own; the base's weights stay as they are.

    Args:
        model: the base, in place, or what this function has returned for it.
        folder: of the adapter.
        name: that no other adapter of the model has.

    Raises:
        UserError: it cannot be read.
    """
    from peft import PeftModel

    read_adapter(folder)
    adapted: nn.Module
    with stand_ins(model):
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name, torch_device=str(model.device))
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, str(folder), name)
    _finish(adapted)
    return adapted


# What a model has


def has_adapter(model: nn.Module) -> bool:
    """Whether the model carries a peft adapter."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def starts_at_base(model: nn.Module) -> bool:
    """Whether the model computes the same with its adapter off: nothing that it adds has an effect yet."""
    return has_adapter(model) and next(updates(model), None) is None


def check_adapter_gradients(model: nn.Module) -> None:
    """After a backward pass, check that every trainable tensor has a gradient.

    Weights of a whole model that have none, such as those of a tower for pictures, stay as they are.

    Raises:
        UserError: some of an adapter have none, for example because a fused kernel reads a layer's weight and ignores
            its adapter.
    """
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if missing and not has_adapter(model):
        log.info("%d weights play no part in text and stay as they are (the first: %s).", len(missing), missing[0])
    elif missing:
        raise UserError(
            f"{len(missing)} trainable tensors received no gradient (the first: {missing[0]}), so their adapter would "
            f"never learn: take these layers out of adapter.target_modules, or set adapter.target_modules=auto."
        )
