"""The KV cache: ragged rows, contiguous (CPU) or paged (CUDA)."""
