"""Page selection by queries and keys: the selector, page scores, budget checks, and a slow reference."""
