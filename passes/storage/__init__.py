"""What a layer of a cache holds and how: values that graphs, passes and caches share."""
