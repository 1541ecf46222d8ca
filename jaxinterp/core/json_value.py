"""JSON values: nested objects and lists of plain leaves, as configurations, records and rows of numbers are.

The name says what is meant. Checkers see any tree, so that a value can be looked into.
"""

from jaxtyping import PyTree as Json

__all__ = ["Json"]
