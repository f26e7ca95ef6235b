"""The engine's side of the server: jobs, the thread that does them, and what handlers call."""
