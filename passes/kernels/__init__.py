"""Triton kernels and their launchers. Nothing here depends on graphs or masks."""
