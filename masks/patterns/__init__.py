"""The patterns of the language: by position, by tensor, on grids, per head, and over remapped positions."""
