"""From files to groups of tokens.

`sources` reads files and hub sets, `layouts` recognises their columns, `rows` holds the text, `tokens` tokenises it,
`units` makes pairs of lists and rows of pairs, and `prepare` does all of it for a run. Large data go through `batches`,
in several processes, into a `token_store`, which `prepared` keeps in the cache. `bundled/`: the quickstart set.
"""
