"""Statistics and examples of prepared rows, for a terminal or an HTML page."""
