"""Small models trained here on synthetic retrieval, and the tasks that ask them: quality without a download."""
