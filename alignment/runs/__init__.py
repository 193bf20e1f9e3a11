"""What a run leaves in its folder and shows you: metrics and samples, its report, its plots, and its run in W&B.

`record` writes the files of a run folder and `folder` reads them; `report` and `cautions` put them into words.
"""
