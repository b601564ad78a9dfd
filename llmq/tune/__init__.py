"""Measuring concurrency: sweeps, what they say, and how they look."""
