"""The tests: a folder per package of proxytune, and `support` with what they share."""
