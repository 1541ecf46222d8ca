"""Resampling: dead features start again as inputs that the dictionary reconstructs badly.

Every `every` steps, for each dead feature j an input x_t of the batch, with target y_t, is drawn with probability
proportional to (|y_t - ŷ_t|^2)^2, without replacement until the batch has been used up:

    D_j   <- u_t = unit((y_t - mean_out) / s_out - b_D)
    E_j   <- shrink * mean over live i of |E_i| * v_t,   v_t = u_t in an autoencoder, else unit((x_t - mean_in) / s_in)
    b_E,j <- 0;   Adam's moments of the rows of j <- 0;   tokens since it fired <- 0
    other parameters of j that the activation holds (a gate's bias, a threshold) <- their mean over live features

x [tokens, d_in]; y [tokens, d_out]; E, D [features, d]; dead: silent for more than `dead_after` tokens. Shapes are
static, and steps without resampling pay nothing for it.

`Resampling(SparseAutoencoder(...), dead_after=...)` is a method like the one inside; `with_resampling` does the same to
a recipe. Defaults: four times, the last at half of the training (published: every 25,000 steps up to the 100,000th);
`dead_after` of the method; shrink = 0.2, which is meant for ReLU: where k codes compete, so short a read vector does
not win and stays dead.

Source: Bricken et al. 2023, "Towards Monosemanticity", appendix on neuron resampling, and ckkissane's
attention-output-saes, whose draws come from 100 batches (here: one) and which restarts the learning rate's warm-up
(here not: see `warmup_linear`). The published loss includes the L1 penalty, here it is the squared error.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import per_feature, trainable
from jaxinterp.core.protocols import Method, MethodState, Recipe
from jaxinterp.core.sites import Needs, Site, Sites
from jaxinterp.core.trees import named_leaves, path_name
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.methods.checks import check_positive, check_whole
from jaxinterp.methods.recipes import OnePass, one_pass
from jaxinterp.methods.sparse.dictionary import unit_rows
from jaxinterp.objectives import Metrics


@runtime_checkable
class CountsDead(Protocol):
    """A method that says itself after how many silent tokens a feature is dead."""

    @property
    def dead_after(self) -> int: ...


@dataclass(frozen=True)
class Resampling:
    """A dictionary's method, with its dead features resampled."""

    method: Method
    """What is trained."""
    every: int | None = None
    """Steps between resamplings; None: an eighth of the training."""
    last: int | None = None
    """No resampling after so many steps; None: half of the training."""
    dead_after: int | None = None
    """A feature is dead when it has not fired for this many tokens; None: as the method has it."""
    shrink: float = 0.2
    """Length of a new read vector, over the mean length of the live ones; TopK needs 1, shorter ones are not chosen."""

    def __post_init__(self) -> None:
        """Raises UserError if a number is invalid, or the method does not say when a feature is dead."""
        check_whole(self, every=1, last=1, dead_after=1)
        check_positive(self, "shrink")
        if self.dead_after is None and not isinstance(self.method, CountsDead):
            raise UserError(
                f"dead_after=None: method={type(self.method).__name__} has none of its own. Give a number, or put "
                "Resampling inside a method of several."
            )

    def needs(self, site: Site) -> Needs | Sites:
        """What the method needs."""
        return self.method.needs(site)

    def recipe(self, steps: int) -> Recipe | OnePass:
        """The method's recipe, with resampling after its step."""
        every = max(1, steps // 8) if self.every is None else self.every
        last = steps // 2 if self.last is None else self.last
        dead_after = self.method.dead_after if isinstance(self.method, CountsDead) else self.dead_after
        dead_after = dead_after if self.dead_after is None else self.dead_after
        assert dead_after is not None  # see __post_init__
        recipe = one_pass(self.method, steps)
        return with_resampling(recipe, every=every, last=last, dead_after=dead_after, shrink=self.shrink)


def with_resampling(
    recipe: Recipe | OnePass, *, every: int, last: int, dead_after: int = 10_000_000, shrink: float = 0.2
) -> Recipe:
    """The recipe whose dead features are resampled after every `every`-th step, up to the `last`-th.

    Raises:
      UserError: when `init` is traced: the recipe does not train a `Dictionary`, or its activation counts for itself;
        when `step` is traced: the objective does not say what fired.
    """

    one_step = recipe.step
    if one_step is None:
        raise UserError("resampling is for a method that is trained step by step.")

    def start(key: PRNGKeyArray, sample: Batch, model: PyTree = None, previous: PyTree = None) -> PyTree:
        state = recipe.init(key, sample, model)
        check_resampled(state)
        return state

    def step(state: PyTree, batch: Batch, key: PRNGKeyArray, model: PyTree = None) -> tuple[PyTree, Metrics]:
        state, metrics = one_step(state, batch, key, model)
        if "fired" not in metrics:
            raise UserError(
                "resampling needs the metric 'fired', without which no feature is ever dead: let the objective return "
                "the metrics of total(...) too."
            )
        dead = state.decomposition.tokens_since_fired > dead_after
        done = batch.step + 1
        now = (done % every == 0) & (done <= last) & jnp.any(dead)
        again = jax.random.fold_in(key, every)
        state = jax.lax.cond(now, lambda s: resample(s, batch, again, dead, shrink), lambda s: s, state)
        return state, metrics

    return Recipe(start, step, recipe.finish)


def check_resampled(state: PyTree) -> None:
    """Raises UserError if dead features of a method's state cannot start again."""
    trained = state.decomposition if isinstance(state, MethodState) else state
    if isinstance(trained, tuple | dict):
        raise UserError(
            "resampling is for a Dictionary, not for several: put it inside, as in "
            "PerLayerTranscoders(Resampling(method))."
        )
    if not isinstance(trained, Dictionary):
        name = type(trained).__name__
        raise UserError(f"resampling is for a Dictionary, not for {name}: take AuxK, which is for it too (auxk=1/32).")
    counted = jax.tree.map(lambda a, b: a and not b, per_feature(trained.activation), trainable(trained.activation))
    if any(jax.tree.leaves(counted)):
        raise UserError(
            f"activation={type(trained.activation).__name__} adapts features by counts of its own, which resampling "
            "would not know of: it revives dead features itself."
        )


def resample(
    state: MethodState, batch: Batch, key: PRNGKeyArray, dead: Bool[Array, " features"], shrink: float = 0.2
) -> MethodState:
    """The state in which every dead feature has started again; the module's equations."""
    d: Dictionary = state.decomposition
    chosen = draw(d, batch, key, dead)
    write = unit_rows((batch.targets - d.output_mean) / d.output_scale - d.decoder_bias)[chosen]
    autoencoder = batch.sites.reads == batch.sites.writes
    read = write if autoencoder else unit_rows(d.normalise(batch.inputs))[chosen]
    live = jnp.maximum(jnp.sum(~dead), 1)
    lengths = jnp.where(dead, 0.0, jnp.linalg.norm(d.encoder, axis=1))
    # Where nothing is alive, its old length is what a new read vector has.
    mean = jnp.where(jnp.all(dead), jnp.mean(jnp.linalg.norm(d.encoder, axis=1)), jnp.sum(lengths) / live)

    def start_again(new: Array, old: Array) -> Array:
        return jnp.where(_beside(dead, old), new, old)

    trained = jax.tree.map(lambda a, b: a and b, per_feature(d.activation), trainable(d.activation))
    activation = jax.tree.map(
        lambda leaf, marked: start_again(_live_mean(leaf, dead), leaf) if marked else leaf, d.activation, trained
    )
    changed = eqx.tree_at(
        lambda d: (d.encoder, d.encoder_bias, d.decoder, d.tokens_since_fired, d.activation),
        d,
        (
            start_again(shrink * mean * read, d.encoder),
            start_again(jnp.zeros_like(d.encoder_bias), d.encoder_bias),
            start_again(write, d.decoder),
            start_again(jnp.zeros_like(d.tokens_since_fired), d.tokens_since_fired),
            activation,
        ),
    )
    return MethodState(changed, forget(state.optimizer, d, dead))


def draw(
    dictionary: Dictionary, batch: Batch, key: PRNGKeyArray, dead: Bool[Array, " features"]
) -> Int[Array, " features"]:
    """A row of the batch for every feature: for the r-th dead one the r-th of a weighted random order of the rows.

    Order: the descending log p_t + Gumbel noise, p_t = (w_t |y_t - ŷ_t|^2)^2; rows without weight are never drawn.
    """
    output = dictionary.decode(
        dictionary.encode(batch.inputs, k=batch.k, weight=batch.weight, training=True), batch.inputs
    )
    error = jnp.sum((batch.targets - output) ** 2, axis=-1)
    luck = 2 * jnp.log(error + 1e-30) + jax.random.gumbel(key, error.shape, dtype=jnp.float32)
    order = jnp.argsort(jnp.where(batch.weight > 0, -luck, jnp.inf))
    rank = jnp.cumsum(dead) - 1
    return order[rank % jnp.maximum(jnp.sum(batch.weight > 0), 1)]


def forget(optimizer: PyTree, dictionary: Dictionary, dead: Bool[Array, " features"]) -> PyTree:
    """The optimizer's state with the rows of dead features 0, where it belongs to a parameter with a row a feature."""
    marks = jax.tree.map(lambda a, b: a and b, per_feature(dictionary), trainable(dictionary))
    leaves = named_leaves(dictionary)
    rows = {name: leaves[name].shape for name, marked in named_leaves(marks).items() if marked}

    def clear(path: tuple[PyTree, ...], leaf: PyTree) -> PyTree:
        name = path_name(path)
        own = any(name.endswith(f"/{row}") and leaf.shape == shape for row, shape in rows.items())
        return jnp.where(_beside(dead, leaf), 0, leaf).astype(leaf.dtype) if own else leaf

    return jax.tree_util.tree_map_with_path(clear, optimizer)


def _beside(dead: Array, leaf: Array) -> Array:
    """`dead` with as many axes as the leaf."""
    return dead.reshape(-1, *[1] * (leaf.ndim - 1))


def _live_mean(leaf: Array, dead: Array) -> Array:
    """The mean row of live features; a dead feature's own where there is none."""
    live = ~_beside(dead, leaf)
    mean = jnp.sum(jnp.where(live, leaf, 0.0), axis=0) / jnp.maximum(jnp.sum(live), 1)
    return jnp.where(jnp.any(live), mean, leaf)
