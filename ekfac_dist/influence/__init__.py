"""Influence queries: query gradients, scans of the training data, details, and results."""
