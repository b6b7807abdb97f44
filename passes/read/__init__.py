"""Find attention calls in a graph, however a model writes them."""
