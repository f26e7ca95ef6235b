"""Makes small tuned models: the training loop, and the demo's models."""
