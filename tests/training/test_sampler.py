"""Which groups make up each optimizer step, and that the Trainer really takes these."""

import json

import pytest
import torch
from transformers import AutoTokenizer, TrainingArguments

from alignment.config.compose import load
from alignment.data.preparation.prepare import fit_preferences, read_preferences
from alignment.data.tokens.units import as_rows
from alignment.errors import UserError
from alignment.losses import LOSSES
from alignment.scoring.layout import FlatLayout
from alignment.training.objective import groups_to_reference, mismatched_groups
from alignment.training.sampler import StepSampler
from alignment.training.trainer import PreferenceTrainer
from tests.conftest import random_groups, tiny_policy


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(("num_groups", "per_step"), [(1, 1), (5, 8), (8, 4), (11, 4), (11, 1)])
def test_every_group_once_in_every_epoch(num_groups, per_step, seed):
    sampler = StepSampler(num_groups, per_step, seed)
    for epoch in range(3):
        steps = list(sampler.steps(epoch))
        assert sorted(i for step in steps for i in step) == list(range(num_groups))
        assert len(steps) == len(sampler) == -(-num_groups // per_step)
        assert all(len(step) == per_step for step in steps[:-1])


def test_the_order_is_a_function_of_seed_and_epoch():
    orders = {
        (seed, epoch): str(list(StepSampler(30, 4, seed).steps(epoch))) for seed in range(4) for epoch in range(4)
    }
    assert len(set(orders.values())) == 16
    torch.manual_seed(1)
    sampler = StepSampler(30, 4, 2)
    list(sampler)
    sampler.set_epoch(3)
    assert str(list(sampler)) == str(list(sampler)) == orders[2, 3]


@pytest.mark.parametrize(
    ("num_groups", "per_step", "min_groups", "lengths"),
    [
        (9, 4, 1, [4, 4, 1]),
        (9, 4, 2, [4, 5]),
        (10, 4, 2, [4, 4, 2]),
        (10, 4, 3, [4, 6]),
        (1, 4, 2, [1]),  # no step before it: the data are refused where they are loaded
    ],
)
def test_a_last_step_that_is_too_small_joins_the_one_before(num_groups, per_step, min_groups, lengths):
    sampler = StepSampler(num_groups, per_step, 0, min_groups)
    assert [len(step) for step in sampler.steps(0)] == lengths
    assert len(sampler) == len(lengths)
    assert sorted(i for step in sampler.steps(0) for i in step) == list(range(num_groups))


def test_first_steps_run_through_the_epochs():
    sampler = StepSampler(7, 3, 5)
    assert list(sampler.first_steps(8)) == [*sampler.steps(0), *sampler.steps(1), *sampler.steps(2)[:2]]
    assert list(sampler.first_steps(0)) == []


# Several parts of the data


@pytest.mark.parametrize(("epochs", "starts"), [(1, (2, 5)), (3, (6, 15)), (1.5, (3, 8))])
def test_parts_follow_each_other_with_all_their_epochs(epochs, starts):
    """Of 6, 7 and 5 groups in steps of three: 2 + 3 + 2 steps an epoch, shared out as near as whole steps come."""
    parts = [[*range(6)], [*range(6, 13)], [*range(13, 18)]]
    sampler = StepSampler(18, 3, 5, parts=parts, epochs=epochs)
    assert (len(sampler), sampler.num_steps, sampler.starts) == (7, -(-7 * epochs // 1), starts)
    steps = list(sampler.first_steps(sampler.num_steps))
    ends = [*starts, len(steps)]
    for part, start, end in zip(parts, [0, *starts], ends, strict=True):
        alone = StepSampler(len(part), 3, 5).first_steps(end - start)
        assert steps[start:end] == [[part[i] for i in step] for step in alone], "as if the part were all the data"
    assert [step for epoch in range(4) for step in sampler.steps(epoch)][: len(steps)] == steps
    if epochs != 1.5:
        counts = [sum(step.count(i) for step in steps) for i in range(18)]
        assert counts == [epochs] * 18


def test_one_part_is_all_the_data():
    in_parts, whole = StepSampler(11, 4, 3, parts=[range(11)]), StepSampler(11, 4, 3)
    assert list(in_parts.first_steps(9)) == list(whole.first_steps(9))
    assert StepSampler(11, 4, 3, epochs=2.5).num_steps == 8
    assert StepSampler(11, 4, 3, epochs=2.5, max_steps=2).num_steps == 2


def test_a_last_step_that_is_too_small_joins_the_one_before_in_every_part():
    sampler = StepSampler(9, 4, 0, 2, parts=[[*range(5)], [*range(5, 9)]])
    assert [len(step) for step in sampler.steps(0)] == [5, 4]


class Recorder(PreferenceTrainer):
    """Writes down which groups reach a training step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        position = {id(group): i for i, group in enumerate(self.groups)}
        self.seen.append([position[id(group)] for group in inputs["groups"]])
        return super().training_step(model, inputs, num_items_in_batch)


def recorder(groups, folder, max_steps, sampler):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=max_steps, use_cpu=True, report_to="none", disable_tqdm=True,
        remove_unused_columns=False, save_strategy="steps", save_steps=1, learning_rate=1e-2, seed=99,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = Recorder(
        model=tiny_policy(torch.float32), args=arguments, groups=groups, eval_groups=[],
        loss=LOSSES["simpo"](beta=2.0, gamma_beta_ratio=0.5), reference=None, layout=FlatLayout(),
        tokens_per_batch=10_000, sampler=sampler, callbacks=[],
    )  # fmt: skip
    trainer.seen = []
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("min_groups", "parts"),
    [(1, None), (2, None), (1, [range(3), range(3, 9)])],
    ids=["plain", "merged", "in parts"],
)
def test_training_takes_the_first_steps_also_when_resumed(min_groups, parts, tmp_path):
    """Nine groups in steps of four, seven steps over three epochs; then again from checkpoints in and between these."""
    groups = random_groups(9, seed=2)

    def sampler():
        return StepSampler(9, 4, 3, min_groups, parts=parts, max_steps=7)

    expected = list(sampler().first_steps(7))
    trainer = recorder(groups, tmp_path, 7, sampler())
    trainer.train()
    assert trainer.seen == expected
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    for done in (2, 3, 5):
        resumed = recorder(groups, tmp_path, 7, sampler())
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{done}"))
        assert resumed.seen == expected[done:], f"after step {done}"
        for name, parameter in resumed.model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter, weights[name]), f"after step {done}: {name}"


def test_the_reference_is_prepared_for_exactly_these_steps():
    """With mismatched rows, which depend on the order of the step, and the held-out pairs as rows."""
    kto = LOSSES["kto"](beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)
    rows, held_out = as_rows(random_groups(5, seed=3)), random_groups(3, seed=4)
    sampler = StepSampler(len(rows), 4, 1, kto.min_items)
    steps = sampler.first_steps(4)
    wanted = {key for group in groups_to_reference(kto, rows, steps, held_out) for key in group.keys()}  # noqa: SIM118
    needed = [group for step in steps for group in [rows[i] for i in step]]
    needed += [g for step in steps for g in mismatched_groups(kto, [rows[i] for i in step])]
    needed += held_out + mismatched_groups(kto, as_rows(held_out))
    assert wanted == {key for group in needed for key in group.keys()}  # noqa: SIM118
    assert len(groups_to_reference(kto, rows, steps[:1], [])) == 8, "rows that no step uses are not computed"


@pytest.mark.slow
@pytest.mark.parametrize(("part", "train", "held_out"), [("training", 1, 4), ("held-out", 4, 1)])
def test_a_single_row_is_refused_where_the_loss_needs_a_second(part, train, held_out, tiny_model_folder, tmp_path):
    """A lone KTO row has no mismatched completion."""
    for name, count in (("train", train), ("held_out", held_out)):
        rows = [{"prompt": f"{i}?", "completion": f"{i}!", "label": i % 2 == 0} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load(
        "recipe=quickstart", "loss=kto", f"data.source={tmp_path / 'train.jsonl'}",
        f"data.eval_source={tmp_path / 'held_out.jsonl'}", "data.limit=null", "data.eval_limit=null",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    with pytest.raises(UserError, match=rf"loss kto is defined for at least 2 {part} rows, and .* has 1\.$"):
        fit_preferences(read_preferences(config.data, tokenizer), config.data, config.loss)
