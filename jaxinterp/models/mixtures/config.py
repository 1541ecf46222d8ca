"""Which kind of MLP a trained model has, where it is not a plain or gated one: a part of its configuration."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import PRNGKeyArray, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.mixer import random_mixer, random_permuted
from jaxinterp.models.mixtures.moe_x import random_moe_x
from jaxinterp.models.mixtures.monet import random_monet
from jaxinterp.models.mixtures.product_keys import random_product_keys
from jaxinterp.models.rational import random_kat

KindOfMLP = Literal[
    "moe_x", "switch", "monet_horizontal", "monet_vertical", "linear_neurons", "peer", "mixer", "permuted", "kat"
]


@dataclass(frozen=True)
class MixtureConfig:
    """The sizes of an MLP of another kind. `hidden` counts the neurons of one expert, or of the whole MLP.

    moe_x, switch          `experts` MLPs of `hidden` neurons, `active` of them a token (moe_x: ReLU, no router weights)
    monet_horizontal       experts^2 experts of `hidden` neurons; `heads` routers, `active` of `experts` a side and head
    monet_vertical         the same
    linear_neurons, peer   experts^2 neurons (for each of `heads` channels: linear_neurons), `active` a channel
    mixer, permuted        pieces of `experts` numbers (a divisor of d_model), 4 times as wide inside
    kat                    `hidden` neurons, `experts` groups with a denominator each
    """

    kind: KindOfMLP
    experts: int = 8
    hidden: int = 512
    active: int = 2
    heads: int = 4
    key_size: int = 32

    def __post_init__(self) -> None:
        """Raises UserError if two sizes contradict each other."""
        for name in ("experts", "hidden", "active", "heads", "key_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.kind not in ("mixer", "permuted", "kat") and self.active > self.experts:
            raise UserError(f"active={self.active} must be at most experts={self.experts}.")
        if self.kind == "monet_vertical" and self.hidden % 2:
            raise UserError(f"hidden={self.hidden} must be even: each side of a vertical expert has half of it.")


def make_mlp(config: MixtureConfig, d_model: int, key: PRNGKeyArray) -> PyTree:
    """An MLP of that kind with random weights.

    Raises:
      UserError: d_model cannot be cut into the pieces that the kind needs.
    """
    experts, hidden, active = config.experts, config.hidden, config.active
    if config.kind in ("mixer", "permuted", "kat") and d_model % experts:
        raise UserError(f"experts={experts} must divide d_model={d_model} for mlp kind {config.kind!r}.")
    if config.kind == "moe_x":
        return random_moe_x(key, d_model, hidden, experts, active)
    if config.kind == "switch":
        return random_moe_x(key, d_model, hidden, experts, active, routed=True)
    if config.kind == "monet_horizontal":
        return random_monet(key, d_model, experts, hidden, config.heads, active)
    if config.kind == "monet_vertical":
        return random_monet(key, d_model, experts, hidden, config.heads, active, "vertical")
    if config.kind == "mixer":
        return random_mixer(key, experts, d_model // experts)
    if config.kind == "permuted":
        return random_permuted(key, experts)
    if config.kind == "kat":
        return random_kat(key, d_model, hidden, experts)
    kind: Literal["linear", "peer"] = "peer" if config.kind == "peer" else "linear"
    return random_product_keys(key, d_model, d_model, experts, config.heads, active, config.key_size, kind)
