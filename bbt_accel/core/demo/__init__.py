"""The shipped backbone and task."""

from pathlib import Path

BACKBONE = Path(__file__).parent / "backbone"
DATA = Path(__file__).parent / "data"
