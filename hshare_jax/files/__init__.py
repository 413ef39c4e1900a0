"""Files: written completely or not at all, checked against checksums, and results that a later run continues."""
