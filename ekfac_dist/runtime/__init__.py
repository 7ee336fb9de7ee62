"""What a run stands on: processes, files, progress, memory. Knows no model, no mathematics."""
