"""The scoring engine that cache-ref and train share: packs, attention, log-probs."""
