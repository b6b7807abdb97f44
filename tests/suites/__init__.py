"""Other people's test suites, run over models that this library has compiled."""
