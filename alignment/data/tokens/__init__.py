"""Tokens: rows tokenised to groups and conversations, with what of them is scored.

`tokenization` makes them, by `encoding` in one process and by `batches` in several; `token_store` keeps many in files;
`units` makes pairs of lists and rows of pairs.
"""
