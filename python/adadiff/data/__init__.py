"""Data sets: scans of digits, canvases made of them, letters of fonts, and published data sets in local files."""
