"""A decoding step as one CUDA graph, and the loop that starts and reads it."""
