"""Calibration on recorded runs: exit thresholds for a budget, width schedules, step selectors."""
