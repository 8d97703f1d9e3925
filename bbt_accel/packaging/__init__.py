"""Packages: tuned prompts as self-contained models that other tools load."""
