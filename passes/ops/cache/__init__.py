"""The ops that read and write the buffers of a SparseCache."""
