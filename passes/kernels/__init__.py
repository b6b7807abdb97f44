"""Triton kernels and their launchers. Nothing here knows graphs or masks."""
