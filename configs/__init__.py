"""Configs; each file overrides the defaults in `base`."""
