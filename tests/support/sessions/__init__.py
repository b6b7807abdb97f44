"""Caches that are used step by step and compared with their oracles."""
