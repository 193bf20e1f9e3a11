"""Files of other tools, and the recipes that are made of them."""
