"""The decoding core: ids and logits only. It never sees a string, a file, Hugging Face or HTTP."""
