"""What the passes share: attention calls as values, and reading and writing FX graphs."""
