"""Policies inside vLLM."""
