"""Programs for a checkout of this repository; none of them is part of the package."""
