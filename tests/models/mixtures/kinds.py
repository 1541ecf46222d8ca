"""Every kind of MLP in a small size, for models of width 8."""

from jaxinterp.models.mixtures.config import MixtureConfig

KINDS = {
    "moe_x": MixtureConfig("moe_x", experts=4, hidden=6, active=2),
    "switch": MixtureConfig("switch", experts=4, hidden=6, active=1),
    "monet_horizontal": MixtureConfig("monet_horizontal", experts=4, hidden=4, active=2, heads=2),
    "monet_vertical": MixtureConfig("monet_vertical", experts=4, hidden=4, active=2, heads=2),
    "linear_neurons": MixtureConfig("linear_neurons", experts=4, active=2, heads=2, key_size=4),
    "peer": MixtureConfig("peer", experts=4, active=2, heads=2, key_size=4),
    "mixer": MixtureConfig("mixer", experts=2),
    "permuted": MixtureConfig("permuted", experts=2),
    "kat": MixtureConfig("kat", experts=4, hidden=12),
}
