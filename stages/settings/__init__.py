"""The configuration keys of the stages."""
