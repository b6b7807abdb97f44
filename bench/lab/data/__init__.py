"""Tasks, texts and the vocabulary."""
