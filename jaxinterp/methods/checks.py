"""Checks of hyperparameters, made before compute is spent: each names the field, its value and what it must be."""

import numpy as np

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.sites import Site


def check_whole(hyper: object, **least: int) -> None:
    """Raises UserError if a named field (None apart) is not a whole number or is below its minimum."""
    for name, lowest in least.items():
        value = vars(hyper)[name]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise UserError(f"{name}={value!r} must be a whole number.")
        if value < lowest:
            raise UserError(f"{name}={value} must be at least {lowest}.")


def check_positive(hyper: object, *names: str) -> None:
    """Raises UserError if a named field (None apart) is not above 0."""
    for name in names:
        value = vars(hyper)[name]
        if value is not None and not value > 0:
            raise UserError(f"{name}={value} must be positive.")


def check_not_negative(hyper: object, *names: str) -> None:
    """Raises UserError if a named field is below 0, or no number."""
    for name in names:
        value = vars(hyper)[name]
        if not value >= 0:
            raise UserError(f"{name}={value} must not be negative: 0 switches it off.")


def check_one_of(hyper: object, name: str, known: tuple[str, ...], otherwise: str = "") -> None:
    """Raises UserError if a named field is none of the known words; `otherwise`: what else there is."""
    value = vars(hyper)[name]
    if value not in known:
        words = repr(known[0]) if len(known) == 1 else f"one of {', '.join(known)}"
        raise UserError(f"{name}={value!r} must be {words}{otherwise}.{suggest(str(value), known)}")


LEAF = ("mlp", "attn")
"""How the name of a leaf ends: `blocks/3/mlp`."""


def one_array(site: Site, array: str, usual: str = "out") -> str:
    """The array that an autoencoder takes apart: `array` of a leaf, or the site itself where it names an array.

    Args:
      site: `blocks/3/mlp` or `blocks/3/resid/post`.
      array: the method's own field; `usual` is its default.
    Raises:
      UserError: the site is several, or names an array while `array` names another.
    """
    if not isinstance(site, str) or not _names_an_array(site):
        return f"{one_leaf(site)}/{array}"
    if array != usual and site.rpartition("/")[2] != array:
        raise UserError(
            f"site={site!r} is an array and array={array!r} names another: leave array away, or name a leaf."
        )
    return site


def _names_an_array(site: str) -> bool:
    """Whether a site ends as an array of a leaf or of the model does; a name of one word may be a leaf of any model."""
    leaf, _, port = site.rpartition("/")
    expert = port == "shared" or (port.isdigit() and leaf.endswith("/mlp/experts"))  # of a mixture
    return site in ("embed", "final", "pooled") or ("/" in site and port not in LEAF and not expert)


def one_leaf(site: Site) -> str:
    """The site, if it is the name of one leaf.

    Raises:
      UserError: it is several, or an array.
    """
    if isinstance(site, str) and _names_an_array(site):
        raise UserError(
            f"site={site!r} is an array, and this method reads and writes a leaf: name the leaf, such as blocks/3/mlp; "
            "autoencoders take an array."
        )
    if not isinstance(site, str):
        raise UserError(
            f"site={site!r} is not a single leaf, such as blocks/3/mlp, which this method takes; "
            "PerLayerTranscoders(method) takes several."
        )
    return site
