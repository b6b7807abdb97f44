"""Decide which mask a call gets, which heads run together, and with which kernel and tiles."""
