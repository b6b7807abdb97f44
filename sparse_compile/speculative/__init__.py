"""Speculative decoding with one model: steps under a sparse policy draft tokens, and the full attention verifies them."""
