"""One pass over a worker's batches, and the sequences that it reads."""
