"""Floor 3: what a person touches: the command line, the configuration, the stages in order, reports."""
