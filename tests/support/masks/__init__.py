"""Masks for tests."""
