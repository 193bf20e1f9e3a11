"""Sources: files here or behind an address, hub sets, bundled sets; read record by record into checked rows.

`loading` does it for a run. `opening` says what a source means, `folders`, `remote` and `hub` find its files, `formats`
and `json_stream` read them. `decontamination` leaves out the rows of evaluation sets.
"""
