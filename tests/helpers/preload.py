"""Imported by the fork server of `tests.helpers.commands`: everything that takes long to import."""

import gc

import matplotlib.figure
import peft
import transformers.models.qwen3.modeling_qwen3
import trl.trainer.sft_trainer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import alignment.run
import alignment.stages.chain
from alignment.config.compose import compose_node
from alignment.config.registry import register
from alignment.policy.targets import linear_targets

__all__ = ["alignment", "matplotlib", "peft", "transformers", "trl"]

# What every process of ours does first is the same in each: reading Hydra's plugins and grammar, the schemas, the
# recipes and the options, the code of the model, the fonts of plots.
register()
compose_node(["recipe=quickstart", "loss.beta=0.1"])
get_checkpoint_conversion_mapping("qwen3")
linear_targets(AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", num_hidden_layers=1, hidden_size=8)))
matplotlib.figure.Figure().subplots()

# No later collection walks the libraries again: a trainer collects at each of its ends.
gc.collect()
gc.freeze()
