"""How responses are scored: the rules of the tasks, and win rates."""
