"""The methods beside HShare, one file each: what a user would take instead."""
