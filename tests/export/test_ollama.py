"""Chat templates as Ollama has them: by a small reader of Go's templates, they give what the Jinja template gives."""

import re
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from alignment.errors import UserError
from alignment.export.ollama import frames_of, modelfile
from alignment.policy.tiny_model import CHATML

DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start|>' + m['role'] + '<|stop|>\n\n' "
    "+ m['content'] | trim + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
FOLDED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'U: ' + (messages[0]['content'] + ' ' if loop.last and "
    "messages[0]['role'] == 'system' else '') + m['content'] + '\n' }}{% elif m['role'] == 'assistant' %}"
    "{{ 'A: ' + m['content'] + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
LATE = CHATML.replace("m['content'] +", "(m['content'] if loop.last else m['content'] | upper) +")


@pytest.fixture
def tokenizer(tiny_model_folder):
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def go(template: str, turns: list[dict]) -> str:
    """What Ollama makes of a template: `if`, `else`, `range` and fields, as far as the templates here have them."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    out, place = [], 0
    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")

    def block(run: bool, turn: dict | None) -> str:
        """Writes to the end of a block, and says which word ended it."""
        nonlocal place
        while place < len(parts):
            text = parts[place]
            place += 1
            if place % 2:
                if run:
                    out.append(text)
            elif text == "end" or text.startswith("else"):
                return text
            elif text == "range .Messages":
                start = place
                for one in turns if run and turns else []:
                    place = start
                    block(True, one)
                if not (run and turns):
                    block(False, turn)
            elif text.startswith("if "):
                condition, done = text[3:], False
                while True:
                    true = run and not done and holds(condition, turn)
                    ended = block(true, turn)
                    done = done or true
                    if ended == "end":
                        break
                    condition = ended.removeprefix("else").removeprefix(" if ") or "true"
            elif run:
                out.append({".System": system, ".Content": (turn or {}).get("content")}[text])
        return "end"

    def holds(condition: str, turn: dict | None) -> bool:
        if role := re.fullmatch(r'eq \.Role "(\w+)"', condition):
            return turn is not None and turn["role"] == role[1]
        return {"true": True, ".System": bool(system)}[condition]

    block(True, None)
    return "".join(out)


def turns_of(*contents, system=None):
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CONVERSATIONS = [turns_of("Which?"), turns_of("Which?", "This\none.", "Why?")]
TOLD = [turns_of("Which?", system="Be brief."), turns_of("a", "b", "c", system="Be brief.\nAnd kind.")]


@pytest.mark.parametrize(
    ("template", "takes_system"),
    [(CHATML, True), (DEFAULT, True), (LLAMA3, True), (NO_SYSTEM, False)],
    ids=["chatml", "default", "llama3", "no system"],
)
def test_a_translated_template_gives_the_same_text(template, takes_system, tokenizer):
    tokenizer.chat_template = template
    tokenizer.bos_token = "<|im_start|>"
    found = frames_of(tokenizer)
    for turns in [*CONVERSATIONS, *(TOLD if takes_system else [])]:
        expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert go(found.to_go(), turns) == expected


def test_the_first_token_that_ollama_writes_is_left_out(tokenizer):
    """Where the tokenizer puts it before every text, so does Ollama."""
    tokenizer.chat_template, tokenizer.bos_token = LLAMA3, "<|im_start|>"
    beginning = SimpleNamespace(
        chat_template=LLAMA3,
        bos_token="<|im_start|>",
        bos_token_id=257,
        apply_chat_template=tokenizer.apply_chat_template,
    )

    class Begins(SimpleNamespace):
        def __call__(self, text):
            return {"input_ids": [257, 1]}

    found = frames_of(Begins(**vars(beginning)))
    with_it = frames_of(tokenizer)
    for turns in [*CONVERSATIONS, *TOLD]:
        assert "<|im_start|>" + go(found.to_go(), turns) == go(with_it.to_go(), turns)


@pytest.mark.parametrize(
    "template", [FOLDED, LATE, CHATML.replace("<|im_end|>", "{" * 2)], ids=["folded", "late", "signs"]
)
def test_a_template_that_is_no_frame_is_refused(template, tokenizer, tmp_path):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"^to=ollama: the chat template does more .* llama-server --jinja"):
        modelfile(tmp_path / "x-q8_0.gguf", tokenizer, [256], {})


def test_the_modelfile(tokenizer, tmp_path):
    found = modelfile(tmp_path / "x-q8_0.gguf", tokenizer, [256, 257], {"temperature": 0.6, "repetition_penalty": 1.1})
    assert found == (
        "FROM ./x-q8_0.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ range .Messages }}'
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        '<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|im_start|>"\n'
        "PARAMETER temperature 0.6\nPARAMETER repeat_penalty 1.1\n"
    )
    tokenizer.chat_template = None
    assert "TEMPLATE" not in modelfile(tmp_path / "x.gguf", tokenizer, [256], {})
