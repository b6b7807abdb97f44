"""What writes the nodes of a call for its kernel: queries, keys, tables, page selection and cache writes."""
