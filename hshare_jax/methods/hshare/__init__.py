"""HShare (ICLR 2025): lists of critical tokens that layers, heads and steps share by a plan."""
