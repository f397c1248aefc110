"""Evaluation beyond a run's own: sets, weights, views, scores and records of `evaluate.py`."""
