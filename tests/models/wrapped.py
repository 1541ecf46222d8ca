"""A module that does what the one inside it does."""

import equinox as eqx


class Wrapped(eqx.Module):
    """A different module that does what the original does."""

    inner: eqx.Module

    def __call__(self, x):
        return self.inner(x)
