"""Rows of text: one prompt with its completions, checks of them, and those that were left out, with reasons.

`row` is the row, `sequences` holds many of them in little memory, `row_facts` what is true of all, `findings` what a
check of their text finds, `reasons` why some are left out.
"""
