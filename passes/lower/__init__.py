"""Replace attention calls by calls of the kernels that run them."""
