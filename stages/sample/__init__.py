"""Stage 4, `align sample`: a policy and prompts to completions. Begin at `stage.py`."""
