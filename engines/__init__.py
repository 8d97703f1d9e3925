"""Engines: whatever runs an exported backbone, behind one interface."""
