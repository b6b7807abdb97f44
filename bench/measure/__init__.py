"""Timing, the physical bounds of the machine, attention shapes, and rows of results."""
