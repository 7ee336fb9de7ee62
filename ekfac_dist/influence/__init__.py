"""Answers to influence queries: query gradients, scans of the training data, details, results."""
