"""What a method is, under its old address: the protocols are in `core.protocols`, the lifters in `methods.recipes`."""

from jaxinterp.core.protocols import Method, MethodState, Recipe
from jaxinterp.methods.recipes import add_up, gradient_method, no_change, warmup_linear

__all__ = ["Method", "MethodState", "Recipe", "add_up", "gradient_method", "no_change", "warmup_linear"]
