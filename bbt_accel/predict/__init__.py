"""Scores and predictions with a run, the scikit-learn estimator, and fit."""
