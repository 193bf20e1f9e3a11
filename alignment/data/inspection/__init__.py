"""What a run would make of its data, shown to you: `python -m alignment.data`.

`inspection` gathers it, `report` prints it or makes a page. `template_verdict` asks the chat template, `mistakes` looks
for likely ones, `token_view` shows rows token by token, `words` and `histogram` count.
"""
