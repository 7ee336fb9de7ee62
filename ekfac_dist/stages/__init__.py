"""The stages of a fit: covariance, eigenbasis, refit, and the run that joins them."""
