"""The shipped backbone and task."""
