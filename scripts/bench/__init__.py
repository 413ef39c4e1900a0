"""Timings: of kernels, of decode steps, of training. Each prints one table."""
