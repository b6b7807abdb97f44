"""Custom ops and modules that run inside compiled graphs. Each op has a schema, a fake form and an eager form."""
