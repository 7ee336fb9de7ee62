"""From a source of text to batches of token sequences. Knows no model."""
