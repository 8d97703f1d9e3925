"""Backbones and runs over HTTP."""
