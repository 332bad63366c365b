"""Grids of runs, each one s3prl's own runner in a process of its own, and the tables made from their results."""
