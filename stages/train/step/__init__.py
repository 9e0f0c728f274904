"""One optimizer step: log-probs, loss, gradient and metrics, independent of how the step is split."""
