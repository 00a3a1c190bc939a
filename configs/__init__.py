"""Recipes: one small file each, all children of `base`."""
