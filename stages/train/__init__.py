"""Stage 3, `align train`: rows and cached log-probs to a policy. Begin at `stage.py`."""
