"""Evaluation: tasks that measure what sparse decoding costs in quality."""
