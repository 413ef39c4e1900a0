"""The evaluation tasks, one a file."""
