"""What tests share: models, ways to run them, oracles, sessions, masks."""
