"""Metrics of training runs as curves: pictures, and drawings in a terminal."""
