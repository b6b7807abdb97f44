"""Caches in use, step by step, beside their oracles."""
