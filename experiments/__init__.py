"""Experiments: one runnable module per result."""
