"""From the body of a request to its answer, whole or streamed."""
