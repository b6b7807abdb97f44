"""Tensors of a graph by head and by row: the heads of a group, and the rows of a cache and of a ring."""
