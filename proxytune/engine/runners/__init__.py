"""One model behind two operations: run a forward over ragged rows, and move those rows about."""
