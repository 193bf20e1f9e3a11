"""Losses of other tools as losses of this package: the formulas agree, `alignment.losses.parity` has their values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from alignment.errors import UserError, positive
from alignment.migration.draft import Draft

TOKENS = {"nll_reduction": "token_mean", "nll_scope": "response"}
"""The NLL of TRL: a mean over the tokens of all chosen answers."""
SEQUENCES = {"nll_reduction": "sequence_mean", "nll_scope": "response"}
"""The NLL of LLaMA-Factory: of each chosen answer the mean over its own tokens."""


@dataclass
class Part:
    """One loss with its settings, the keys that these come from, and its weight in the sum."""

    name: str
    settings: dict[str, Any]
    weight: float = 1.0
    keys: tuple[str, ...] = field(default=())


def put_loss(draft: Draft, parts: list[Part], *keys: str) -> None:
    """Choose the loss of a recipe: one, or a mixture of several.

    Raises:
        UserError: one loss twice, which a mixture cannot name.
    """
    origins = (*keys, *(key for part in parts for key in part.keys))
    if len(parts) == 1:
        [part] = parts
        draft.choose("loss", part.name, *keys)
        for name, value in part.settings.items():
            draft.put(f"loss.{name}", value, *(part.keys or keys))
        if part.weight != 1:
            draft.note(
                keys[-1] if keys else part.keys[0],
                f"One loss by itself has no weight here, and {part.weight:g} times it is the same step with Adam, "
                f"unless the gradient is clipped (optim.max_grad_norm).",
            )
        return
    names = [part.name for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{keys[0]}: two of the losses are {twice[0]} here, and a mixture names each once.")
    draft.choose("loss", "mixture", *keys)
    draft.put("loss.weights", {part.name: part.weight for part in parts}, *origins)
    draft.put("loss.settings", {part.name: part.settings for part in parts}, *origins)


# TRL's losses of pairs, which Axolotl has too


def trl_pairs(draft: Draft, names: list[str], weights: list[float], keys: tuple[str, str, str]) -> list[Part]:
    """The losses that `loss_type` of TRL's DPO names.

    Args:
        draft: has the numbers, and gets notes.
        names: of TRL.
        weights: one for each.
        keys: of the loss, of beta, and of the label smoothing.

    Raises:
        UserError: a loss that this package does not have.
    """
    where, of_beta, smoothing = keys
    beta, epsilon = draft.number(of_beta), draft.number(smoothing)
    parts = []
    for name, weight in zip(names, weights, strict=True):
        read: tuple[str, ...] = (of_beta,)
        if name in _BETA_ONLY:
            part = Part(_BETA_ONLY[name], {"beta": beta}, weight)
        elif name == "sigmoid":
            part = Part("dpo", {"beta": beta, "label_smoothing": 0.0}, weight)
        elif name == "ipo":
            part = Part("ipo", {"tau": beta, "reduction": "mean"}, weight)
        elif name == "exo_pair":
            part, read = Part("exo", {"beta": beta, "epsilon": epsilon}, weight), (of_beta, smoothing)
        elif name == "robust":
            part, read = Part("robust_dpo", {"beta": beta, "flip_rate": epsilon}, weight), (of_beta, smoothing)
        elif name in ("aot", "aot_unpaired", "aot_pair"):
            option = "aot" if name == "aot" else "aot_unpaired"
            part, read = Part(option, {"beta": beta, "label_smoothing": epsilon}, weight), (of_beta, smoothing)
            draft.note(where, f"{name} sorts the whole step here, and one micro-batch of one process there.")
        elif name == "discopop":
            part, read = (
                Part("discopop", {"beta": beta, "tau": draft.number("discopop_tau")}, weight),
                (of_beta, "discopop_tau"),
            )
        elif name == "sppo_hard":
            part = Part("sppo", {"beta": beta}, 2 * weight)
            draft.note(where, "sppo_hard lacks the factor 1/2 of its authors there, which sppo has here.")
        elif name == "sft":
            part, read = Part("nll", dict(TOKENS), weight), ()
            draft.note(where, "sft is a mean over the tokens of the whole step here, and of a micro-batch there.")
        else:
            known = ["sigmoid", "ipo", "exo_pair", "robust", "aot", "aot_unpaired", "discopop", "sppo_hard", "sft"]
            raise UserError(
                f"{where}: {name} has no translation; what has one: {', '.join(sorted([*known, *_BETA_ONLY]))}."
            )
        part.keys = read
        parts.append(part)
    used = any(name in ("exo_pair", "robust", "aot", "aot_unpaired", "aot_pair") for name in names)
    if epsilon and not used:
        draft.note(
            smoothing,
            f"{names[0]} has ignored it in TRL since 0.29, so it is left out; "
            f"loss.label_smoothing={epsilon:g} makes DPO conservative here, as older versions did.",
        )
    return parts


_BETA_ONLY = {
    "hinge": "hinge",
    "nca_pair": "nca",
    "bco_pair": "bco_pair",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "sigmoid_norm": "ln_dpo",
}


def plain_sigmoid(parts: list[Part], key: str) -> Part:
    """The one DPO term that a variant changes.

    Raises:
        UserError: the losses are others, for which this package has no such variant.
    """
    if [part.name for part in parts] != ["dpo"]:
        raise UserError(f"{key} is translated with the loss sigmoid alone: take one of the two out.")
    return parts[0]


def with_nll(draft: Draft, parts: list[Part], weight: float, key: str, settings: dict[str, Any]) -> list[Part]:
    """The losses with an NLL of the chosen answer added; nothing changes with weight 0."""
    draft.seen.add(key)
    return [*parts, Part("nll", dict(settings), weight, (key,))] if weight else parts


def contrastive(draft: Draft, where: str, keys: tuple[str, str, str]) -> list[Part]:
    """TRL's CPO with `simpo`: SimPO, and an NLL unless its weight is 0.

    Args:
        draft: has the numbers, and gets notes.
        where: the key that chose the loss.
        keys: of beta, of the margin gamma, which is beta times the ratio that SimPO has here, and of the NLL's weight.
    """
    beta, gamma, alpha = map(draft.number, keys)
    positive(keys[0], beta)
    draft.note(keys[1], "SimPO's margin is given as gamma / beta here (loss.gamma_beta_ratio).")
    ratio = {"beta": beta, "gamma_beta_ratio": gamma / beta}
    if not alpha:
        return [Part("simpo", ratio, 1.0, keys)]
    if not draft.gives(keys[2]):
        draft.note(where, f"SimPO has an NLL of weight {alpha:g} there unless {keys[2]} is 0: this is cpo_simpo here.")
    return [Part("cpo_simpo", {**ratio, "alpha": alpha, **TOKENS}, 1.0, keys)]


def odds_ratio(draft: Draft, lam: float, key: str) -> list[Part]:
    """TRL's ORPO."""
    draft.note(key, "The NLL of ORPO reads the prompt too, as there; the paper's is loss.nll_scope=response.")
    return [Part("orpo", {"lam": lam, "nll_reduction": "token_mean", "nll_scope": "prompt_and_response"}, 1.0, (key,))]
