"""Slow, plain truths to hold the library against."""
