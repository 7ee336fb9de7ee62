"""Fitting factors: covariance, eigenbasis, refit, and the run that joins them."""
