"""Nine public files, three of each tool: each composes, and docs/migrating.md says what of them has no translation.

public/ has the keys and values of the files that the page names, without comments and empty keys.
"""

import re
from pathlib import Path

import pytest
import yaml

from tests.helpers.migrated import migrated

FILES = sorted((Path(__file__).parent / "public").glob("*.yaml"))
ROWS = {
    cells[0]: cells[1:]
    for line in (Path(__file__).parents[2] / "docs" / "migrating.md").read_text().splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 5
}
"""Of the page: a public file, how many keys it has, how many are settings, which of these differ, which are none."""
EXPECTED = {
    "axolotl_lora_dpo": {"loss.name": "dpo", "optim.lr": 2e-4, "adapter.r": 32, "trainer.groups_per_step": 8},
    "axolotl_qlora_kto": {"loss.beta": 0.5, "loss.desirable_weight": 0.2, "quantization.double": True},
    "axolotl_qlora_orpo": {"loss.name": "orpo", "loss.lam": 0.1, "data.eval_size": 200, "optim.name": "adamw_bnb_8bit"},
    "llamafactory_lora_dpo": {"loss.beta": 0.1, "adapter.r": 8, "data.limit": 1000, "trainer.save_every": 500},
    "llamafactory_lora_kto": {"loss.name": "kto", "trainer.eval_every": 500, "data.max_length": 2048},
    "llamafactory_oft_dpo": {"adapter.kind": "oft", "adapter.block_size": 32, "optim.warmup_ratio": 0.1},
    "trl_capybara_orpo": {"loss.name": "orpo", "loss.lam": 0.05, "adapter": None, "data.max_prompt_length": 1792},
    "trl_smollm3_apo": {"loss.name": "apo_zero", "optim.max_grad_norm": 0.2, "model.revision": "it-SFT"},
    "trl_zephyr_dpo": {"loss.beta": 0.01, "data.eval_split": "test_prefs", "optim.name": "paged_adamw_32bit"},
}


def listed(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def test_there_are_three_of_each_tool():
    assert [path.stem for path in FILES] == sorted(EXPECTED) and len(ROWS) == len(FILES) + 2
    tools = [path.stem.partition("_")[0] for path in FILES]
    assert {tool: tools.count(tool) for tool in tools} == {"axolotl": 3, "llamafactory": 3, "trl": 3}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_composes_and_the_page_says_what_is_not_translated(path, tmp_path):
    """A key that is no setting either has a reason, or asks for nothing that is not so here; none is unknown."""
    method = "orpo" if path.stem == "trl_capybara_orpo" else None
    config, draft = migrated(tmp_path, path.read_text(), rows=2000, method=method)
    for key, value in EXPECTED[path.stem].items():
        found = config
        for name in key.split("."):
            found = getattr(found, name)
        assert getattr(found, "value", found) == value, key
    placed = {key for keys in draft.origins.values() for key in keys} & set(draft.given)
    noted = set(draft.notes) & set(draft.given)
    keys, settings, differing, others = ROWS[path.read_text().partition(",")[0].removeprefix("# ")]
    assert draft.unknown == [] and draft.given == yaml.safe_load(path.read_text())
    assert (int(keys), int(settings)) == (len(draft.given), len(placed))
    assert (listed(differing), listed(others)) == (noted & placed, noted - placed)
