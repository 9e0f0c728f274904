"""Layer 1: Arrow shards, manifests, fingerprints and the store of reference log-probs.

Nothing here knows about language models, and nothing here imports torch.
"""
