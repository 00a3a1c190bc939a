"""What every layer uses: errors, progress bars, files, downloads, processes, devices."""
