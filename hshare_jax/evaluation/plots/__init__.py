"""Figures of evaluations: how alike choices of tokens are, and the cost of methods in quality and time."""
