"""Imports point one way: a module may import from lower layers only, and heavy libraries stay where they belong."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "alignment"

LAYERS = [
    {"run", "plan", "lab", "losses.__main__"},
    {"compose", "sweep_cohorts"},
    {"stages", "cache"},
    {"preference_stage"},
    {"evaluation", "export", "gate", "kl", "preflight", "report", "sft_result"},
    {"comparison"},
    {"comparison.page", "comparison.tracked"},
    {"comparison.charts"},
    {"comparison.tables", "comparison.answers"},
    {"comparison.sentences", "comparison.head_to_head"},
    {"comparison.ranking"},
    {"comparison.measures"},
    {"comparison.members", "comparison.statistics"},
    {"cohort", "sweep_tracking", "preference", "sft", "plots", "figures", "schedule", "stage_data"},
    {"objective"},
    {
        "stage_store",
        "stopping",
        "training",
        "reference",
        "metrics",
        "steps",
        "tracking",
        "generate",
        "planning",
        "run_folder",
    },
    {"memory"},
    {"policy", "records", "shared"},
    {"data.tokens", "data.sources"},
    {"data.layouts", "data.statistics", "reference_store", "wheel_model", "tiny_model", "logps", "lean"},
    {"data.rows", "lists", "layout", "data.quickstart", "judge", "scored", "density", "lean.mlp"},
    {"losses.parity", "losses.landscape", "lean.linear"},
    {"losses", "attention", "head", "lean.norm", "lean.rotary"},
    {"block_attention", "lean.base"},
    {"losses.mixture", "losses.plackett_luce", "losses.all_pairs", "losses.infonca", "losses.lipo"},
    {
        "losses.aot",
        "losses.kto",
        "losses.ld_dpo",
        "losses.sampo",
        "losses.tdpo",
        "losses.wpo",
        "losses.lists",
        "losses.ipo",
        "losses.apo",
        "losses.alpha_dpo",
        "losses.bco",
        "losses.bco_pair",
        "losses.beta_dpo",
        "losses.cal_dpo",
        "losses.discopop",
        "losses.dpop",
        "losses.exo",
        "losses.f_dpo",
        "losses.gpo",
        "losses.ln_dpo",
        "losses.nca",
        "losses.r_dpo",
        "losses.robust_dpo",
        "losses.sppo",
        "losses.rpo",
        "losses.odpo",
        "losses.mallows_po",
    },
    {
        "losses.cpo",
        "losses.tpo",
        "losses.dpo",
        "losses.simpo",
        "losses.orpo",
        "losses.alphapo",
        "losses.repo",
        "losses.slic_hf",
    },
    {"losses.nll"},
    {"losses.base", "losses.running"},
    {"config", "ragged", "groups"},
    {"errors", "", "data", "products", "allocator"},
]
"""From the command down; modules of one layer do not import each other."""

ONLY_IN = {
    "hydra": {"run", "compose"},
    "omegaconf": {"run", "compose", "sweep_cohorts"},
    "wandb": {"tracking", "sweep_tracking"},
    "trl": {"sft"},
    "matplotlib": {"plots", "figures"},
    "plotly": {"comparison.charts", "comparison.tracked"},
    "sqlite3": {"reference_store", "cache"},
    "greenlet": {"cohort"},
    "bitsandbytes": {"policy", "export", "lean.linear"},
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_layer():
    listed = [name for layer in LAYERS for name in layer]
    assert sorted(listed) == sorted(map(name_of, MODULES))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    own = name_of(path)
    for imported in imports(path):
        if not imported.startswith("alignment."):
            root = imported.split(".")[0]
            assert own in ONLY_IN.get(root, {own}), f"{root} is imported in {own}"
            continue
        target = imported.removeprefix("alignment.")
        if target in rank:
            assert rank[target] > rank[own], f"{own} imports {target}"
