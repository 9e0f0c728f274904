"""Floor 1: Arrow shards, manifests, fingerprints and the store of reference log-probs.

Nothing here knows what a language model is, and nothing here imports torch.
"""
