"""A fuzzer of the public entries: random cases, played by the library and by an oracle that shares no code with it."""
