"""Chats with policies in a terminal or a browser: one, or two side by side, whose answers you can vote on.

`opening` finds the policies and `speaker` lets them speak, `session` is a conversation, `votes` keeps what you prefer,
`heat` says token by token what alignment has changed; `terminal` and `web` show all this.
"""
