"""Configs: a small file each, which overrides the defaults in `base`."""
