"""Shared by all layers: errors, progress bars, files, downloads, processes, devices."""
