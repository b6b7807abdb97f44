"""Attention over a SparseCache: find the calls, check that the cache fits them, and split them by storage."""
