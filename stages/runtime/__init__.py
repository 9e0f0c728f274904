"""The environment of a stage: store and progress, device and dtype, ranks, memory."""
