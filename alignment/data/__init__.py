"""From files to groups of tokens, in seven rooms. Each imports only those after it.

`inspection` shows what the others make of data. `preparation` is the data of a run: `tokens` are made of rows, which
`sources` read, in one of the `layouts` that are known. `conversations` are messages and what a chat template makes of
them, `rows` the text that all of them pass on. `bundled/`: the quickstart set.
"""
