"""What `python benchmarks/run.py --suite NAME` measures."""
