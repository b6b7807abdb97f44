"""Mask patterns: by position, from tensors, on grids, per head, and over remapped positions."""
