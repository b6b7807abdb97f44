"""The KV cache that holds what a policy still sees: its plan, its layers, its positions, its files."""
