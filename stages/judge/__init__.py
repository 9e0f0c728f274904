"""`align judge`: completions to verdicts. Begin at `stage.py`."""
