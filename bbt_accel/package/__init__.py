"""Runs as models that other tools load."""
