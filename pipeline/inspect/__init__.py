"""What `align inspect` shows of prepared rows: lengths, cuts, and single examples, on a terminal or a page."""
