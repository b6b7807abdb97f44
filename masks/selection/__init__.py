"""Masks that look at queries and keys: what they choose, how pages are scored, and the slow reference."""
