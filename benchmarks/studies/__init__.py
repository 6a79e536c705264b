"""One-off studies, each with its own script: `python -m benchmarks.studies.NAME`."""
