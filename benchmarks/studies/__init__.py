"""Questions answered once, each by a script of its own: `python -m benchmarks.studies.NAME`."""
