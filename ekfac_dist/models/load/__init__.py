"""Loading a model on all workers, and telling it from another one."""
