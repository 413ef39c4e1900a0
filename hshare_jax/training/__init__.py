"""Training: causal language models on text files, resumable bit for bit after a kill at any moment."""
