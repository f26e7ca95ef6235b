"""The paper's analyses of stored runs and traces. No model is loaded."""
