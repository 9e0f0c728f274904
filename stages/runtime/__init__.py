"""What a stage runs on: store and progress, device and arithmetic, ranks, memory."""
