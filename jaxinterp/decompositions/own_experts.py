"""The experts of a trained mixture as a decomposition: its own neurons with their write vectors, and nothing is lost.

    MoE-X         y = sum_n c_n d_n,   c_n = w_m(x) act(x . u_n + b_n) of neuron n of expert m
    product keys  y = sum_n c_n v_n,   c_n = s_n (x . u_n), or softmax(s)_n gelu(x . u_n)
    Monet (HD)    y = sum_jm c_jm V_jm + sum_hj g2_hj b_j,   c_jm = sum_hi g1_hi g2_hj act(x U_i + a_i)_m

Read vectors are u_n; a neuron (j, m) of Monet reads through every U_i, so it has none, and its codes end with n more,
sum_h g2_hj, whose write vectors are b_j. FVU is 0, and L0 is the number of neurons that a token uses.

Source: Yang et al. 2025 (arXiv 2503.07639); Park et al. 2024 (arXiv 2412.04139); Schug 2026 (arXiv 2606.07414).
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.batch import Sites
from jaxinterp.core.decomposition import Codes
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import STATE
from jaxinterp.decompositions.codes import DenseCodes, SparseCodes, weighted_rows
from jaxinterp.decompositions.offered import replaced
from jaxinterp.models.layers import Tap, no_tap
from jaxinterp.models.mixtures.moe_x import MoEX
from jaxinterp.models.mixtures.monet import Horizontal, Monet, Statistics, choose, router_logits
from jaxinterp.models.mixtures.product_keys import ProductKeyMLP, neuron_values, weigh
from jaxinterp.models.mixtures.product_keys import choose as choose_keys
from jaxinterp.models.rules import EXACT, Rules, activate


class OwnExperts(eqx.Module):
    """The neurons of a `MoEX` or a `ProductKeyMLP`."""

    mixture: MoEX | ProductKeyMLP = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    sites: Sites = eqx.field(static=True)

    @property
    def encoder(self) -> Float[Array, "features d_in"]:
        """u_n, expert after expert."""
        if isinstance(self.mixture, MoEX):
            return jnp.swapaxes(self.mixture.up, 1, 2).reshape(-1, self.mixture.up.shape[1])
        return self.mixture.read

    @property
    def decoder(self) -> Float[Array, "features d_out"]:
        """d_n or v_n."""
        if isinstance(self.mixture, MoEX):
            return self.mixture.down.reshape(-1, self.mixture.down.shape[2])
        return self.mixture.write

    @property
    def features(self) -> int:
        """How many neurons there are."""
        return self.decoder.shape[0]

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Array | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> DenseCodes | SparseCodes:
        """c_n: dense of MoE-X, the chosen neurons of product keys."""
        if isinstance(self.mixture, MoEX):
            return DenseCodes(self.mixture.hidden(x))
        scores = self.mixture.scores(x)
        how_much, index = weigh(choose_keys(scores, self.mixture.knn), self.mixture.kind, scores.shape[-1])
        values = neuron_values(x, how_much, index, self.mixture.read, self.mixture.kind)
        return SparseCodes(values, index, self.features)

    def combine(self, codes: Codes) -> Float[Array, "*axes d_out"]:
        """Codes times write vectors."""
        return weighted_rows(codes, self.decoder)

    def decode(self, codes: Codes, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        """y of the module's equation."""
        return self.combine(codes)

    def __call__(
        self, x: Float[Array, "*axes d_in"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_out"]:
        return replaced(self, x, tap)


class OwnMonet(eqx.Module):
    """The neurons (j, m) of a horizontal `Monet`, and its n biases."""

    mixture: Monet = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    sites: Sites = eqx.field(static=True)

    @property
    def decoder(self) -> Float[Array, "features d_out"]:
        """V_jm, j after j, then b_j."""
        down, bias = self.mixture.experts.down, self.mixture.experts.down_bias
        return jnp.concatenate([down.reshape(-1, down.shape[-1]), bias])

    @property
    def features(self) -> int:
        """n m + n."""
        return self.decoder.shape[0]

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Array | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> DenseCodes:
        """c_jm, then sum_h g2_hj; with the running statistics."""
        own, experts = self.mixture, self.mixture.experts
        gates = choose(router_logits(x, own.router), Statistics(own.mean, own.variance), own.k).astype(x.dtype)
        first, second = gates[..., 0, :, :], gates[..., 1, :, :]
        neurons = activate(own.activation, jnp.einsum("...d,idm->...im", x, experts.up) + experts.up_bias, EXACT)
        mixed = jnp.einsum("...hm,...hj->...jm", jnp.einsum("...im,...hi->...hm", neurons, first), second)
        return DenseCodes(jnp.concatenate([mixed.reshape(*x.shape[:-1], -1), jnp.sum(second, axis=-2)], axis=-1))

    def combine(self, codes: Codes) -> Float[Array, "*axes d_out"]:
        """Codes times write vectors."""
        return weighted_rows(codes, self.decoder)

    def decode(self, codes: Codes, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        """y of the module's equation."""
        return self.combine(codes)

    def __call__(
        self, x: Float[Array, "*axes d_in"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_out"]:
        return replaced(self, x, tap)


def own_experts(
    mixture: PyTree, site: str, *, target_mean: Float[Array, " d_out"] | None = None
) -> OwnExperts | OwnMonet:
    """The decomposition of a mixture into its own neurons.

    Args:
      mixture: the leaf itself, `model.blocks[3].mlp`.
      site: its name, `blocks/3/mlp`.
      target_mean: the mean of its output over training tokens, for mean ablation; default: 0.
    Raises:
      UserError: the leaf is another kind of module, or a vertical Monet, whose experts share no neurons.

    Example: `scoreboard({"experts": own_experts(model.blocks[0].mlp, "blocks/0/mlp")}, subject, heldout)`.
    """
    sites = Sites(f"{site}/in", f"{site}/out")
    if isinstance(mixture, MoEX | ProductKeyMLP):
        d_out = mixture.down.shape[2] if isinstance(mixture, MoEX) else mixture.write.shape[1]
        return OwnExperts(mixture, jnp.zeros(d_out, jnp.float32) if target_mean is None else target_mean, sites)
    if isinstance(mixture, Monet) and isinstance(mixture.experts, Horizontal):
        d_out = mixture.experts.down.shape[2]
        return OwnMonet(mixture, jnp.zeros(d_out, jnp.float32) if target_mean is None else target_mean, sites)
    kind = "vertical Monet" if isinstance(mixture, Monet) else type(mixture).__name__
    raise UserError(f"the leaf at {site!r} is a {kind}: own_experts takes MoE-X, product keys and horizontal Monet.")
