"""Exporters: a checkpoint becomes a bundle, and a bundle a faster bundle."""
