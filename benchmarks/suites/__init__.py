"""Suites of `python benchmarks/run.py --suite NAME`."""
