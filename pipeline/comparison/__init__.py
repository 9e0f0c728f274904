"""`align compare`: from its arguments to figures, and how they are shown."""
