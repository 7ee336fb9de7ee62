"""Processes, files, locks, progress and memory of a run. Knows no model and no mathematics."""
