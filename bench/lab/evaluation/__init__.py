"""The quality bench: methods, plans, jobs, rows and findings."""
