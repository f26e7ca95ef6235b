"""The compiled parts: C++ on the CPU, Triton on CUDA, and what picks between them."""
