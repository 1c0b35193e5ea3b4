"""Monitoring of a run: step metrics, live view, sample tables, plots, alarms and trackers."""
