"""Policies of finished runs asked and judged again: win rates against each other, and what else tells them apart.

`entrants` says who takes part, `win_rates` has their answers judged, and `page` shows what was found.
"""
