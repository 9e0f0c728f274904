"""Models on disk and in memory: finding, identifying, loading, adapters."""
