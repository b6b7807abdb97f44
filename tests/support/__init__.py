"""Code that tests share: models, ways to run them, oracles, sessions and masks."""
