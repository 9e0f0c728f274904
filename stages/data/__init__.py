"""Preference data read from files, mixed from several sources, and kept as rows and pairs."""
