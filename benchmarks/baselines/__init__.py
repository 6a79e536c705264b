"""What early exit is compared with: plain networks at their fastest, other methods, other servers."""
