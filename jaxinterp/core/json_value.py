"""JSON values: nested objects and lists of plain leaves, as configurations, records and rows of numbers are.

Checkers see any tree, so that a value can be looked into; with annotations checked at run time, as in the tests, every
leaf must be a truth value, a number or a word (null is an empty tree).
"""

from typing import TYPE_CHECKING

from jaxtyping import PyTree

if TYPE_CHECKING:
    from jaxtyping import PyTree as Json
else:
    Json = PyTree[bool | int | float | str]

__all__ = ["Json"]
