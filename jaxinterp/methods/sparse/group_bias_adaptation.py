"""Group Bias Adaptation: a tied autoencoder whose sparsity is set by biases that no gradient touches.

    a = w (y' - c),   y' = (y - mean) / s
    z_m = gain_m a_m  where a_m + b_m > 0, else 0           the bias decides, the size is that of a
    y ≈ s (sum_m z_m w_m + c) + mean,   |w_m| = 1
    loss = |y - ŷ|^2 / V;   gradients train w, gain and c

b is adapted every `every` steps from how often its neuron was active: see `GroupBias`, which holds b and the counts.
Groups have target frequencies that fall geometrically, so that both common and rare features find their neurons.

y [tokens, d]; w [features, d]; gain, b [features]; c [d]; V the target's variance; s^2 = V, so that inputs have mean
square length 1 and the least bias, -1, silences a neuron at all but the longest. Start: w random unit rows, gain 1,
b = c = 0.

The dictionary is tied by construction: with D = w and b_D = c, `tie` makes the others, E = w and b_E = -w c, after
every step, and `tied_gradient` is the chain rule through it: the gradients of all four are pulled back to w and c. (To
train D and copy it would leave out the encoder's gradient.) After every step E and D hold the same numbers; what Adam
keeps of E is not used, as `tie` makes E anew from D.

Defaults: 10 groups, frequencies 0.5 to 0.001, every 50 steps, rate 0.01. Half of the features are active at first.

Source: Chen et al. 2025, arXiv 2506.14002, algorithm 1; update and defaults as two independent reports of it agree, not
checked against the paper: bounds of b in the one consistent order, revival of silent neurons by their group's mean,
no resampling. The paper's factor 1/2 of the loss makes no difference to Adam.
"""

from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.protocols import MethodState, Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.adaptive import GroupBias
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.methods.checks import check_one_of, check_whole, one_array
from jaxinterp.methods.recipes import gradient_method
from jaxinterp.methods.sparse.dictionary import (
    TrainingFields,
    adam,
    check_dictionary,
    count,
    empty_dictionary,
    tangential,
    unit_rows,
)
from jaxinterp.objectives import Forward, Metrics, Objective, Ratio, Term, reconstruction, total


@dataclass(frozen=True)
class GroupBiasAdaptation(TrainingFields):
    """Hyperparameters of Group Bias Adaptation."""

    groups: int = 10
    """How many groups of neurons, each with a target frequency; 1 is plain bias adaptation."""
    highest: float = 0.5
    """Target frequency of the first group."""
    lowest: float = 1e-3
    """Target frequency of the last group."""
    every: int = 50
    """Steps between adaptations."""
    rate: float = 0.01
    """How far a bias moves, as a fraction of its neuron's largest value (of its group's mean one, upwards)."""
    gain: float = 1.0
    """All gains at the start. 1 overshoots by features / (2 d): large dictionaries want less: experiments/gba.py."""
    array: Literal["out", "hidden", "in"] = "out"
    """Which array of the MLP it takes apart."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter makes no sense."""
        check_dictionary(self)
        check_one_of(self, "array", ("out", "hidden", "in"))
        check_whole(self, groups=1, every=1)
        self.make_activation()

    def needs(self, site: Site) -> Sites:
        """The same array, read and written.

        Raises:
          UserError: the site is not a single leaf.
        """
        name = one_array(site, self.array)
        return Sites(name, name)

    def make_activation(self) -> GroupBias:
        """Biases and counts at 0."""
        return GroupBias.start(
            self.features,
            groups=self.groups,
            highest=self.highest,
            lowest=self.lowest,
            every=self.every,
            rate=self.rate,
            gain=self.gain,
        )

    def make_objective(self) -> Objective:
        """reconstruction, and the metric `largest`; or the objective given, which must have that metric too."""
        return self.objective or total(reconstruction(), largest())

    def recipe(self, steps: int) -> Recipe:
        """Adam on w, gain and c; ties, unit rows, counts and biases after every step."""

        def init(key: PRNGKeyArray, sample: Batch, model: PyTree) -> Dictionary:
            return self._start(key, sample)

        def project(dictionary: PyTree, gradient: PyTree) -> PyTree:
            return tangential(dictionary, tied_gradient(dictionary, gradient))

        return gradient_method(init, self.make_objective(), adam(self, steps), _after_step, project)

    def _start(self, key: PRNGKeyArray, sample: Batch) -> Dictionary:
        dictionary = empty_dictionary(self, self.make_activation(), sample, skip=False, normalise=True)
        scale = dictionary.input_scale * jnp.sqrt(dictionary.encoder.shape[1])
        dictionary = eqx.tree_at(lambda d: (d.input_scale, d.output_scale), dictionary, (scale, scale))
        return tie(
            dictionary,
            unit_rows(jax.random.normal(key, dictionary.decoder.shape, dtype=jnp.float32)),
            dictionary.decoder_bias,
        )


def _parts(d: PyTree) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    return d.encoder, d.encoder_bias, d.decoder, d.decoder_bias


def _tied(w: Float[Array, "features d"], c: Float[Array, " d"]) -> tuple[Array, Array, Array, Array]:
    """E, b_E, D and b_D."""
    return w, -w @ c, w, c


def tie(dictionary: Dictionary, w: Float[Array, "features d"], c: Float[Array, " d"]) -> Dictionary:
    """The dictionary with E = D = w, b_D = c, b_E = -w c."""
    return eqx.tree_at(_parts, dictionary, _tied(w, c))


def tied_gradient(dictionary: Dictionary, gradient: PyTree) -> PyTree:
    """The gradient by w and c, in the places of D and b_D; E has that of w too, b_E none (`tie` makes it anew)."""
    _, pull_back = jax.vjp(_tied, dictionary.decoder, dictionary.decoder_bias)
    of_w, of_c = pull_back(_parts(gradient))
    return eqx.tree_at(_parts, gradient, (of_w, jnp.zeros_like(gradient.encoder_bias), of_w, of_c))


def largest() -> Term:
    """Nothing to the loss; metric `largest`: per feature max(0, max_t a_t + b) over the tokens that have weight."""

    def term(decomposition: PyTree, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        activation = decomposition.activation
        sizes = jnp.max(jnp.abs(forward.codes.dense()) * (batch.weight[:, None] > 0), axis=0)
        pre = sizes / jnp.where(sizes > 0, jnp.abs(activation.gain), 1.0)  # z = gain a, and a > 0 where it is active
        highest = jnp.where(sizes > 0, pre + activation.adapted_bias, 0.0)
        return jnp.zeros((), jnp.float32), {"largest": Ratio(highest, jnp.ones((), jnp.float32))}

    return term


def _after_step(state: MethodState, batch: Batch, metrics: Metrics, key: PRNGKeyArray) -> MethodState:
    counted = count(state, batch, metrics, key)
    dictionary = counted.decomposition
    return MethodState(tie(dictionary, unit_rows(dictionary.decoder), dictionary.decoder_bias), counted.optimizer)
