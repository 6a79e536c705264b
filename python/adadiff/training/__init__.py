"""Training of networks and exits, resumable."""
