"""Training: causal language models on text files. A run that is killed at any moment resumes bit for bit."""
