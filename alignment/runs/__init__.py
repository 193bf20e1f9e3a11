"""What a run leaves behind: records, reports, plots, tracking."""
