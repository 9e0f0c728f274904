"""One optimizer step: log-probs, loss, gradient and metrics, however the step is split."""
