"""Figures: arrays to arrays, arrays to figures, figures to a page."""
