"""Training-free sparse decoding for LLaMA-family models in JAX."""
