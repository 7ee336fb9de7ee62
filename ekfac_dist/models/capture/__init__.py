"""What passes through the tracked modules: inputs, output gradients, labels and losses."""
