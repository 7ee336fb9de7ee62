"""Which modules a model has, what passes through them, and which labels its positions get."""
