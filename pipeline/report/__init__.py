"""`align report`: training runs as one page, one picture, or curves in a terminal."""
