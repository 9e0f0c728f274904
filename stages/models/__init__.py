"""Models: found on disk or on the hub, identified, loaded, with adapters."""
