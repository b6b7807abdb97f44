"""Tasks, texts and the words that they are made of."""
