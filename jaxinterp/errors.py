"""`jaxinterp.core.errors` under the name that it had before version 2."""

from jaxinterp.core.errors import UserError

__all__ = ["UserError"]
