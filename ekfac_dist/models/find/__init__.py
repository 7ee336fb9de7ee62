"""Which modules of a model are tracked, and why others are not."""
