"""Heat lines: the numbers of two passes by transformers, and texts that cannot become markup."""

import io

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from alignment.chat.heat import Heat, as_html, as_text, legend, strength
from alignment.errors import UserError
from tests.helpers.chats import chat, silent, write_adapter


def test_the_ratios_are_those_of_the_policy_and_its_base(tiny_model_folder, tmp_path):
    """Of both columns: the base's own answer is seen with the same two policies."""
    folder = write_adapter(tiny_model_folder, tmp_path / "one", 1)
    session = chat(folder)
    session.ask("Add 3 and 21", silent)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), folder).double()
    for column in (0, 1):
        reply, heat = session.reply(column), session.heat(column)
        ids = torch.from_numpy(np.concatenate([reply.prompt, reply.tokens]).astype(np.int64))[None]

        def logps(ids=ids, reply=reply):
            first = len(reply.prompt)
            with torch.no_grad():
                found = model(input_ids=ids).logits[0, first - 1 : -1].log_softmax(-1)
            return found.gather(1, ids[0, first:, None]).squeeze(1).numpy()

        policy = logps()
        with model.disable_adapter():
            base = logps()
        np.testing.assert_allclose(heat.ratios, policy - base, atol=5e-5)
        assert np.abs(heat.ratios).max() > 0.01
        assert f"{heat.ratios.sum():+.2f} nats in {len(reply.tokens)} tokens" in heat.summary
        tokenizer = session.guests.speakers[0].questions.tokenizer
        assert "".join(heat.texts) == tokenizer.decode(reply.tokens.tolist())


def test_a_policy_that_is_its_base_is_cold(tiny_model_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    fresh = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder), LoraConfig(target_modules=["q_proj"])
    )
    fresh.save_pretrained(tmp_path / "fresh")
    session = chat(tmp_path / "fresh")
    session.ask("Add 3 and 21", silent)
    heat = session.heat(0)
    assert np.abs(heat.ratios).max() < 1e-6 and len({tuple(reply.tokens) for reply in session.last.replies}) == 1
    plain = chat(tiny_model_folder)
    plain.ask("Add 3 and 21", silent)
    with pytest.raises(UserError, match="is a plain model: it began with nothing"):
        plain.heat(0)


HEAT = Heat(
    ("mine", "base"),
    ["<script>", "", "é", "\n", " a\x1b[31m", "<|im_end|>"],
    np.array([-1.0, -1.0, -2.0, -0.5, -4.0, -1.0]),
    np.array([-3.0, -1.0, -1.0, -0.5, -0.2, -1.1]),
)


def test_what_a_heat_line_says():
    np.testing.assert_allclose(HEAT.ratios, [2, 0, -1, 0, -3.8, 0.1])
    assert HEAT.summary == "log p(mine) - log p(base): -2.70 nats in 6 tokens, -0.450 for each"
    assert HEAT.strongest == "likelier: <script> +2.00, <|im_end|> +0.10; less likely: ·a\\x1b[31m -3.80, é -1.00"
    assert HEAT.tip(0) == "<script>  +2.00 nats: 0.0498 before, 0.368 now"
    assert (strength(0.0), strength(1.5), strength(-3.0), strength(9.0)) == (0, 0.5, 1, 1)


def test_the_page_escapes_every_text():
    page = as_html("<A>", HEAT)
    assert "<script" not in page and "<A>" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    assert page.count("<span class=") == 6 and page.count("<br>") == 1
    for side, by in (("more", 40), ("less", 20), ("less", 60), ("more", 2)):
        assert f'class="{side}" style="--by: {by}%"' in page


def test_the_terminal_has_colours_and_no_steering():
    console = Console(record=True, force_terminal=True, color_system="truecolor", width=200, file=io.StringIO())
    console.print(as_text(HEAT))
    console.print(legend())
    plain = console.export_text(styles=False, clear=False)
    assert "<script>▫é⏎\n a\\x1b[31m<|im_end|>" in plain and "-3 nats" in plain
    styled = console.export_text(styles=True)
    assert "48;2;143;183;226" in styled, "two of three nats: half of the blue's strength, by three quarters"
