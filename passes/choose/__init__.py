"""Decide: which mask a call gets, which heads run together, on which kernel, in which tiles."""
