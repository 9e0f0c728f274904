"""Logs of a training run and what is derived from them: metrics, dashboards, best evaluation, warnings."""
