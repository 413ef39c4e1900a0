"""Programs for a checkout of this repository. They are not part of the package."""
