"""Plots of what an evaluation measured."""
