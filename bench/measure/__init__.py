"""Timing, bounds of the machine, shapes, and rows of results."""
