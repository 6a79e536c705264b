"""Baselines: plain networks at their fastest, other methods, other servers."""
