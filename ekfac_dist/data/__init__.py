"""From a data source to batches of token sequences. Knows no model."""
