"""Slow, plain reference implementations to compare the library with."""
