"""One file per command: its options and its body."""
