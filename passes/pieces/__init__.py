"""Compile a graph with many layers in pieces, so that Inductor compiles each kind of layer once and not each layer."""
