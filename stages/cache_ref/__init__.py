"""Stage 2, `align cache-ref`: rows to log-probs of the frozen reference. Begin at `stage.py`."""
