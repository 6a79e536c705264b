"""Where images come from: scans in the package, canvases made of them, published sets in local files."""
