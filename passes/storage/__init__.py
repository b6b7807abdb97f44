"""Describe what a layer of a cache holds, and in which format. Graphs, passes and caches share these values."""
