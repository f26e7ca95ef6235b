"""Benchmarks of decoding: `python benchmarks/decode.py --help`. README.md holds what was measured."""
