"""The files that `proxytune init` writes. They work as they are."""
