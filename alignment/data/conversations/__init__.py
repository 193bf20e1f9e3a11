"""Conversations: how data sets write messages, and what a chat template makes of them.

`messages` and `tool_calls` read them, `trajectories` compares them, `dialect` puts them into a template's terms,
`turns` finds them in its text, and `writer` writes rows as text and notes what is wrong with it.
"""
