"""What runs while a compiled graph runs: schema, fake and eager form of every op."""
