"""The miniature world of the demo: its facts, its word problems, its text, and the committed weights of its
models."""
