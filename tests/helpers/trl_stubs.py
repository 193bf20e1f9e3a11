"""TRL's own losses on prepared numbers.

TRL computes its losses inside trainer methods. Each trainer here is made without its constructor, given the few
attributes that those methods read, by TRL's defaults where a test says nothing else, and a model that answers with
prepared log-probs or logits, so that the mathematics that runs is TRL's, unchanged.

The functions `trl_*` return TRL's mean loss over one micro-batch and what TRL logs of it.
"""

from collections import defaultdict
from dataclasses import fields
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from alignment.losses import LossInputs, Quantity
from alignment.types import RaggedLogps

POLICY = [
    [-0.5, -1.0, -0.25, -0.75],
    [-1.0, -0.5, -1.5, -0.25, -0.75, -1.0],
    [-2.0, -1.5],
    [-0.2, -0.1, -0.3, -0.2, -0.4],
    [-0.9],
    [-1.1, -0.7, -0.8],
]
REFERENCE = [
    [-0.75, -1.25, -0.5, -0.5],
    [-0.5, -0.5, -1.0, -0.5, -0.75, -0.95],
    [-1.0, -1.1],
    [-0.9, -0.4, -0.8, -0.6, -0.5],
    [-0.8],
    [-1.0, -0.9, -0.7],
]
"""Three pairs for the pairwise losses, six rows for KTO; the second pair prefers the rejected completion."""

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
VOCABULARY = 7


def bare(trainer_class, config_class, **attributes):
    """A trainer without its constructor, on one CPU process."""
    settings = {f.name: f.default for f in fields(config_class)} | attributes
    trainer = trainer_class.__new__(trainer_class)
    vars(trainer).update(settings, args=SimpleNamespace(**settings), accelerator=ACCELERATOR, aux_loss_enabled=False)
    vars(trainer).update(_metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1)
    return trainer


def padded(ragged):
    return pad_sequence([ragged.sequence(i) for i in range(len(ragged))], batch_first=True)


class PreparedLogProbs:
    """A model whose per-token log-probs are given; the first input id of a row says which sequence is asked for.

    Where collisions are given, it answers with them as the logarithms of the distributions' sums of squares.
    """

    training = True
    is_gradient_checkpointing = False
    _modules: ClassVar = {}  # asked for compiled parts

    def __init__(self, ragged, collisions=None):
        self.table = padded(ragged)
        self.collisions = None if collisions is None else padded(collisions)

    def __call__(self, input_ids, **_):
        log_probs = self.table[input_ids[:, 0]]
        zeros = torch.zeros_like(log_probs)
        answer = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        if self.collisions is not None:
            answer.log_sum_sq_probs = self.collisions[input_ids[:, 0]]
        return answer


class PreparedLogits:
    """A model with given logits (rows, width, vocabulary)."""

    training = True

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids, **_):
        assert input_ids.shape == self.logits.shape[:2]
        return SimpleNamespace(logits=self.logits)


def batch_of(ragged, rows):
    """TRL's tensors for a prompt of one token, its id the row, and the completions of the given rows."""
    width = int(ragged.lengths.max())
    mask = (torch.arange(width + 1) > 0) & (torch.arange(width + 1) <= ragged.lengths[rows, None])
    ids = torch.zeros(len(rows), width + 1, dtype=torch.int64)
    ids[:, 0] = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": mask | (torch.arange(width + 1) == 0), "completion_mask": mask.long()}


def side_by_side(batch):
    """The same batch, chosen rows before rejected ones, for the trainers that take the two under names of their own."""
    labels = torch.where(batch["completion_mask"].bool(), batch["input_ids"], -100)
    tensors = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    sides = {key: zip(("chosen", "rejected"), tensor.chunk(2), strict=True) for key, tensor in tensors.items()}
    return {f"{side}_{key}": rows for key, halves in sides.items() for side, rows in halves}


def random_forward(prompt, lengths):
    """A model for random tokens, TRL's batch, and the rows' log-probs of all tokens but the first, prompt included."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), prompt + max(lengths), VOCABULARY)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(VOCABULARY, shape[:2], generator=generator)
    positions = torch.arange(shape[1])
    attention = positions < prompt + torch.tensor(lengths)[:, None]
    completion = attention & (positions >= prompt)
    batch = {"input_ids": ids, "attention_mask": attention.long(), "completion_mask": completion.long()}
    logps = torch.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return PreparedLogits(logits), batch, [logps[i, : prompt - 1 + n] for i, n in enumerate(lengths)]


def paired_forward(prompt, chosen_lengths, rejected_lengths):
    """TRL's batch for random tokens, a model for it, and our inputs from the same logits.

    Returns the model, the batch, our `LossInputs`, and the chosen rows' log-probs of all tokens but the first, prompt
    included.
    """
    model, batch, whole = random_forward(prompt, chosen_lengths + rejected_lengths)
    pairs = len(chosen_lengths)
    ours = [whole[i][prompt - 1 :] for pair in range(pairs) for i in (pair, pair + pairs)]
    return model, side_by_side(batch), LossInputs(RaggedLogps.from_sequences(ours)), whole[:pairs]


def trl_dpo(step, losses, beta, pairs=None, **settings):
    """DPOTrainer on these pairs of a step, all if None, the reference being run beside the policy.

    `losses` is the name of one loss, or a weight for each.
    """
    weights = {losses: 1.0} if isinstance(losses, str) else losses
    pairs = range(len(step.policy) // 2) if pairs is None else pairs
    rows = [2 * i for i in pairs] + [2 * i + 1 for i in pairs]
    model = PreparedLogProbs(step.policy, step.quantities.get(Quantity.collision))
    trainer = bare(
        DPOTrainer,
        DPOConfig,
        model=model,
        ref_model=PreparedLogProbs(step.reference),
        precompute_ref_logps=False,
        loss_types=list(weights),
        loss_weights=list(weights.values()),
        beta=beta,
        **settings,
    )
    return trainer._compute_loss(model, batch_of(step.policy, rows), False), trainer._metrics["train"]


def trl_kto(step, mismatched, rows, loss_type="kto", **settings):
    """KTOTrainer on the given rows of a step and of its mismatched completions."""
    kl_counts = loss_type == "kto"
    joined = RaggedLogps.from_sequences(
        [r.sequence(i) for r in (step.policy, mismatched.policy) for i in range(len(r))]
    )
    batch, kl = batch_of(joined, rows), batch_of(joined, [len(step.policy) + i for i in rows])
    batch |= {f"KL_{key}": value for key, value in kl.items()}
    batch |= {"label": step.labels[rows]}
    batch |= {"ref_logps": step.reference.sums()[rows], "ref_KL_logps": mismatched.reference.sums()[rows]}
    model = PreparedLogProbs(joined)
    trainer = bare(
        KTOTrainer, KTOConfig, model=model, calculate_KL=kl_counts, precompute_ref_logps=True,
        loss_type=loss_type, **settings,
    )  # fmt: skip
    return trainer._compute_loss(model, batch, False), trainer._metrics["train"]


def trl_cpo(model, batch, **settings):
    trainer = bare(CPOTrainer, CPOConfig, is_encoder_decoder=False, pad_token_id=0, **settings)
    return trainer.get_batch_loss_metrics(model, batch)


def trl_orpo(model, batch, lam):
    trainer = bare(ORPOTrainer, ORPOConfig, beta=lam, is_encoder_decoder=False, padding_value=0)
    return trainer.get_batch_loss_metrics(model, batch)


def trl_tpo(model, batch, **settings):
    """TPOTrainer on all chosen rows, then all rejected, then all gold ones; `reference` is its name for these."""
    trainer = bare(TPOTrainer, TPOConfig, model=model, **settings)
    return trainer._compute_loss(model, batch, False), trainer._metrics["train"]


def assert_same_loss_and_gradient(ours, theirs, leaf, rel=1e-12):
    torch.testing.assert_close(theirs, ours, rtol=rel, atol=1e-12, check_dtype=False)
    (our_gradient,) = torch.autograd.grad(ours, leaf, retain_graph=True)
    (their_gradient,) = torch.autograd.grad(theirs, leaf, retain_graph=True)
    assert our_gradient.abs().max() > 1e-3
    torch.testing.assert_close(their_gradient, our_gradient, rtol=rel, atol=rel)


def trl_reward(rewards, margins=None, **settings):
    """Of (2 * pairs,) rewards: chosen, rejected, chosen, rejected, ..."""
    trainer = bare(RewardTrainer, RewardConfig, model=SimpleNamespace(training=True), **settings)
    logits = torch.cat([rewards[0::2], rewards[1::2]])[:, None]
    batch = {"attention_mask": torch.ones(len(logits), 1)} | ({} if margins is None else {"margin": margins})
    loss = trainer.compute_loss(lambda **_: SimpleNamespace(logits=logits), batch)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}
