"""Imported by the fork server of `tests.helpers.commands`: everything that takes long to import."""

import gc

import matplotlib.pyplot
import peft
import transformers.models.qwen3.modeling_qwen3
import trl.trainer.sft_trainer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import alignment.config.registry
import alignment.run
import alignment.stages.chain

__all__ = ["alignment", "matplotlib", "peft", "transformers", "trl"]

# What every process of ours does first is the same in each: reading Hydra's plugins, the schemas and the recipes.
alignment.config.registry.register()
get_checkpoint_conversion_mapping("qwen3")

# No later collection walks the libraries again: a trainer collects at each of its ends.
gc.collect()
gc.freeze()
