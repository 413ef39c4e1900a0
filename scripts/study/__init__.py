"""Studies of quality on real text, and of cross-layer KV sharing. Each writes the tables of a document."""
