"""Masks to test with."""
