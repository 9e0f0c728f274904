"""Floor 2: the four stages (prepare, cache-ref, train, sample) and the ideas they share."""
