"""Files: written whole or not at all, checked by their sums, and results that a run goes on with."""
