"""Loading a model on all workers, and recognising it again."""
