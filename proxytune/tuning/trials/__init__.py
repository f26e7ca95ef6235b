"""What the methods of tuning are worth, tried out: on the demo world, and on real models."""
