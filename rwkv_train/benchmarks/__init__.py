"""Measurements of speed: warm-up, repeats, medians, JSON."""
