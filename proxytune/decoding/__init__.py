"""Where text meets the engine: prompts, stop strings, streams, and the decoder of a role."""
