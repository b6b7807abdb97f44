"""Small models trained on synthetic retrieval tasks, and benchmarks of their quality, without a download."""
