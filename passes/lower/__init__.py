"""Replace attention calls by the kernels that run them."""
