"""The keys of each tool, one table each: what becomes of them."""
