"""A causal LM of a kind that nobody has seen: odd names, no rotary positions, a norm with a gate, logits that no linear
head gives. transformers loads it by its `model_type`, as it loads code that comes with a checkpoint."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OddConfig(PreTrainedConfig):
    model_type = "odd"

    def __init__(self, num_words=97, width=32, depth=2, **kwargs):
        self.num_words, self.width, self.depth = num_words, width, depth
        super().__init__(**kwargs)


class OddRMSNorm(nn.Module):
    """Named as norms are, and another function: what passes it is gated."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = 1e-6

    def forward(self, x, gate=None):
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normal * torch.sigmoid(gate)


class Blender(nn.Module):
    """A recurrence over the tokens: each sees a fading sum of those before it."""

    def __init__(self, width):
        super().__init__()
        self.inward, self.doorway, self.outward = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.spare = nn.Linear(width, width)  # nobody calls it
        self.fade = nn.Linear(width, width)  # nobody calls it either: its weight is read
        self.level = OddRMSNorm(width)

    def forward(self, x):
        seen, states = torch.zeros_like(x[:, 0]), []
        for token in self.inward(x).unbind(1):
            seen = 0.5 * seen + torch.tanh(token) @ torch.tanh(self.fade.weight)
            states.append(seen)
        return x + self.outward(self.level(torch.stack(states, 1), self.doorway(x)))


class OddModel(PreTrainedModel, GenerationMixin):
    config_class = OddConfig
    _no_split_modules = ("Blender",)

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.num_words, config.width)
        self.blends = nn.ModuleList(Blender(config.width) for _ in range(config.depth))
        self.reader = nn.Linear(config.width, config.num_words)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None, **kwargs):
        x = self.words(input_ids)
        for blend in self.blends:
            x = blend(x)
        logits = torch.asinh(self.reader(x))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register("odd", OddConfig, exist_ok=True)
AutoModelForCausalLM.register(OddConfig, OddModel, exist_ok=True)
