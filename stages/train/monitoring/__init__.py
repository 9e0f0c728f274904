"""What a run tells while it trains: metrics, dashboards, best evaluation, health."""
