"""Sparse dictionaries: one paper, one file."""
