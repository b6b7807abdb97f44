"""Benchmarks of attention alone."""
