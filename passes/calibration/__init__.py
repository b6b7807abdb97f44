"""Passes that calibration adds: mix the outputs of heads, and observe their weights."""
