"""Recover masks in the language from the tensors that a model adds to its scores."""
