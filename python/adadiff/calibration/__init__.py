"""From recorded runs to thresholds for a budget."""
