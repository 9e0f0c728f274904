"""Stage 1, `align prepare`: preference data to rows of token ids and masks. Begin at `stage.py`."""
