"""The passes that calibration adds: mix the outputs of heads, and observe their attention weights."""
