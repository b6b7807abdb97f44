"""The KV cache that stores only what a policy can still see: planning, layers, positions and files."""
