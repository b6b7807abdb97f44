"""Recover masks of the mask language from the tensors that a model adds to its scores."""
