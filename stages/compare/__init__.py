"""Completions and verdicts to figures: who wins, how surely, and how the texts differ. Begin at `comparison.py`."""
