"""How each family computes: one file per family."""
