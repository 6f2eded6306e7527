"""What the studies share: the protocol, the recipes, claims, stored results."""
