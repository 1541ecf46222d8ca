"""The static HTML report: what was trained, how good it is, and what its features respond to."""
