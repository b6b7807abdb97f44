"""Find attention calls in a graph, in every form in which models write them."""
