"""How a model is spread over processes: one contract (`engine.py`), three engines, one place that builds them."""
