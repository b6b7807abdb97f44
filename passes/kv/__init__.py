"""Attention over a SparseCache: find it, check that it fits, and split it by how heads are stored."""
