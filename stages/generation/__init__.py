"""Completions from token ids, by vLLM or transformers, and the files they are written to."""
