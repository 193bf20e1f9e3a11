"""A finished run for others: what of it may go to the hub, the card that tells of it, and how it gets there."""
