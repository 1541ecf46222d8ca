"""The methods SPD and VPD: what `parameters` and `vpd` define, trained by gradient (and against an adversary).

    ParameterParts       parts and gates of every matrix: what is learned
    StochasticParameters (SPD)      loss = terms(...) with fresh random masks at every step
    AdversarialParameters (VPD)     and with masks of an adversary that persists, in the state's `aux`

Both start with `warmup` steps of AdamW on the faithfulness of the parts alone: D is small before masks matter.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.metrics import Metrics, Ratio
from jaxinterp.core.protocols import MethodState, Recipe
from jaxinterp.core.sites import Needs, Site, Sites
from jaxinterp.decompositions.mlp_parts import MaskKind, MLPParts
from jaxinterp.decompositions.parameter_parts import Lower, ParameterParts
from jaxinterp.methods.checks import check_not_negative, check_one_of, check_positive, check_whole
from jaxinterp.methods.factor import parameters as spd
from jaxinterp.methods.factor import vpd
from jaxinterp.methods.factor.targets import Clean, Target, leading_axes, no_gradient, share_left_over
from jaxinterp.methods.recipes import gradient_method, learned
from jaxinterp.models.sites import select


@dataclass(frozen=True)
class StochasticParameters:
    """SPD. The defaults are the authors' for TMS 5-2."""

    target: Target
    """Which matrices, and how the model is run."""
    parts: int = 20
    """Rank-one parts of each matrix."""
    hidden: int = 16
    """Width of each gate."""
    coefficients: spd.Coefficients = field(default_factory=spd.Coefficients)
    """What each term counts."""
    p: float = 1.0
    """Exponent of the importance penalty."""
    learning_rate: float = 1e-3
    """Of Adam; a cosine to 0."""
    warmup: int = 200
    """Steps of AdamW (0.01, weight decay 0.1) on faithfulness before training."""

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_whole(self, parts=1, hidden=1, warmup=0)
        check_positive(self, "p", "learning_rate")

    def needs(self, site: Site = None) -> Needs:
        """What the target needs: windows of text where the whole model is run, rows of one MLP.

        Raises:
          UserError: a site is named that does not fit the target.
        """
        return self.target.needs(site)

    def recipe(self, steps: int) -> Recipe:
        """Adam on the terms."""

        def objective(
            decomposition: ParameterParts, batch: Batch, key: PRNGKeyArray, *, model: PyTree = None
        ) -> tuple[Float[Array, ""], Metrics]:
            clean = no_gradient(self.target.clean(model, batch))
            importances = decomposition.importances(clean.reads)
            sources = spd.uniform_sources(key, importances)
            masked = lambda masks: self.target.masked(model, decomposition.parts, batch, masks)
            weights = self.target.weights(model)
            loss, found = spd.terms(
                masked, clean.output, weights, decomposition.parts, importances, sources,
                kind=self.target.kind, p=self.p, coefficients=self.coefficients, weight=clean.weight,
            )  # fmt: skip
            return loss, reported(found, importances, clean, share_left_over(weights, decomposition.parts))

        optimizer = optax.adam(optax.cosine_decay_schedule(self.learning_rate, steps))
        init = lambda key, sample, model: start(self.target, key, model, self.parts, self.hidden, self.warmup)
        return gradient_method(init, objective, optimizer)


@dataclass(frozen=True)
class AdversarialParameters:
    """VPD. Coefficients are the paper's with mean-square faithfulness; `adversarial=0` switches the adversary off."""

    target: Target
    """Which matrices, and how the model is run."""
    parts: int = 256
    """Rank-one parts of each matrix."""
    hidden: int = 16
    """Width of each gate. (The paper's gates are one transformer that reads all activations.)"""
    faithful: float = 1e7
    """Coefficient of the mean square of D."""
    stochastic: float = 0.5
    """Coefficient of the distance under random masks."""
    adversarial: float = 0.5
    """Coefficient of the distance under the adversary's masks."""
    importance: float = 2e-4
    """Coefficient of sum_c f_c."""
    frequency: float = 1e-4
    """Coefficient of sum_c f_c log2(1 + count f_c)."""
    activity: Literal["power", "smooth"] = "power"
    """What f_c is the mean of: (g + 1e-12)^p, or g^2 / (g^2 + gamma^2)."""
    anneal: tuple[float, float] = (2.0, 0.4)
    """p (or gamma) at the start and at the end, in a straight line."""
    route: bool = True
    """Whether random masks act on a random subset of the matrices for each input."""
    scope: Literal["each", "shared"] = "each"
    """Sources for every input of the batch, or shared by all."""
    ascents: int = 2
    """The adversary's steps before each step; one more comes with it."""
    adversary_rate: float = 0.01
    """Of its Adam."""
    learning_rate: float = 5e-5
    """Of AdamW without decay; a cosine to a tenth."""
    clip: float = 0.01
    """Largest norm of the gradient of all parts."""
    warmup: int = 200
    """Steps on faithfulness before training."""

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_whole(self, parts=1, hidden=1, ascents=0, warmup=0)
        check_positive(self, "learning_rate", "clip", "adversary_rate")
        check_not_negative(self, "faithful", "stochastic", "adversarial", "importance", "frequency")
        check_one_of(self, "activity", ("power", "smooth"))
        check_one_of(self, "scope", ("each", "shared"))

    def needs(self, site: Site = None) -> Needs:
        """What the target needs: windows of text where the whole model is run, rows of one MLP.

        Raises:
          UserError: a site is named that does not fit the target; sources for every input, and rows out of a shuffle
            buffer.
        """
        needs = self.target.needs(site)
        if needs.rows == "stream" and self.scope == "each":
            raise UserError(
                "scope='each' holds a source for every input of a batch of windows; this target trains on shuffled "
                "rows: take scope='shared'."
            )
        return needs

    def recipe(self, steps: int) -> Recipe:
        """AdamW on the loss; the adversary climbs before and with it."""
        optimizer = optax.chain(
            clip_parts(self.clip), optax.adam(optax.cosine_decay_schedule(self.learning_rate, steps, alpha=0.1))
        )

        def init(key: PRNGKeyArray, sample: Batch, model: PyTree = None, previous: PyTree = None) -> MethodState:
            parts_key, adversary_key = jax.random.split(key)
            decomposition = start(self.target, parts_key, model, self.parts, self.hidden, self.warmup)
            axes = leading_axes(jax.eval_shape(self.target.clean, model, sample)) if self.scope == "each" else ()
            counts = dict.fromkeys(decomposition.parts, self.parts)
            adversary = vpd.start_adversary(adversary_key, counts, axes)
            return MethodState(decomposition, optimizer.init(decomposition), adversary)

        def step(
            state: MethodState, batch: Batch, key: PRNGKeyArray, model: PyTree = None
        ) -> tuple[MethodState, Metrics]:
            clean = no_gradient(self.target.clean(model, batch))
            adversary = self._climb(state, clean, batch, model)
            loss = lambda learned, sources: self._loss(learned, sources, clean, batch, key, model, steps)
            (to_parts, to_sources), metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(
                state.decomposition, adversary.sources
            )
            updates, moments = optimizer.update(to_parts, state.optimizer, state.decomposition)
            learned = optax.apply_updates(state.decomposition, updates)
            if self.adversarial:
                adversary = vpd.ascend(adversary, to_sources, rate=self.adversary_rate)
            return MethodState(learned, moments, adversary), metrics

        return Recipe(init, step, learned)

    def _climb(self, state: MethodState, clean: Clean, batch: Batch, model: PyTree) -> vpd.Adversary:
        """The adversary after its steps on this batch, against parts and importances that do not move."""
        if not self.adversarial:
            return state.aux
        learned = state.decomposition
        importances = learned.importances(clean.reads)
        masked = lambda masks: self.target.masked(model, learned.parts, batch, masks)

        def worse(sources: dict[str, Array]) -> Array:
            return vpd.adversarial(masked, clean.output, importances, sources, self.target.kind, clean.weight)

        adversary = state.aux
        for _ in range(self.ascents):
            adversary = vpd.ascend(adversary, jax.grad(worse)(adversary.sources), rate=self.adversary_rate)
        return adversary

    def _loss(
        self,
        learned: ParameterParts,
        sources: dict[str, Float[Array, "..."]],
        clean: Clean,
        batch: Batch,
        key: PRNGKeyArray,
        model: PyTree,
        steps: int,
    ) -> tuple[Float[Array, ""], Metrics]:
        source_key, route_key = jax.random.split(key)
        importances = learned.importances(clean.reads)
        masked = lambda masks: self.target.masked(model, learned.parts, batch, masks)
        apart = lambda masks: spd.distance(clean.output, masked(masks), self.target.kind, clean.weight)
        weights, kind = self.target.weights(model), self.target.kind
        masks = spd.masks_from(importances, spd.uniform_sources(source_key, importances))
        if self.route:
            masks = vpd.routed(masks, vpd.subset_routing(route_key, tuple(masks), leading_axes(clean)))
        now = vpd.annealed(batch.step, steps, *self.anneal)
        measure = vpd.power if self.activity == "power" else vpd.smooth_l0
        frequencies = [spd.mean_over_inputs(measure(g.upper, now), clean.weight) for g in importances.values()]
        count = jnp.sum(clean.weight)
        zero = jnp.zeros((), jnp.float32)
        adversary = zero
        if self.adversarial:
            adversary = vpd.adversarial(masked, clean.output, importances, sources, kind, clean.weight)
        found = {
            "faithful": spd.faithfulness(weights, learned.parts),
            "stochastic": apart(masks),
            "adversarial": adversary,
            "importance": sum((jnp.sum(f) for f in frequencies), zero),
            "frequency": sum((vpd.frequency_penalty(f, count) for f in frequencies), zero),
        }
        asked = (self.faithful, self.stochastic, self.adversarial, self.importance, self.frequency)
        loss = sum((c * value for c, value in zip(asked, found.values(), strict=True)), zero)
        metrics = reported(found, importances, clean, share_left_over(weights, learned.parts))
        return loss, metrics | {"loss": Ratio(loss, jnp.ones((), jnp.float32))}


def start(target: Target, key: PRNGKeyArray, model: PyTree, parts: int, hidden: int, warmup: int = 0) -> ParameterParts:
    """Random parts and gates; then `warmup` steps of AdamW (0.01, weight decay 0.1) on faithfulness alone."""
    weights = target.weights(model)
    made, gates = {}, {}
    for name, weight in weights.items():
        key, parts_key, gates_key = jax.random.split(key, 3)
        made[name] = spd.start_parts(parts_key, parts, *weight.shape)
        gates[name] = spd.start_gates(gates_key, parts, hidden)
    if warmup:
        optimizer = optax.adamw(0.01, weight_decay=0.1)

        def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[PyTree, PyTree], None]:
            parts, state = carry
            gradient = jax.grad(lambda parts: spd.faithfulness(weights, parts))(parts)
            updates, state = optimizer.update(gradient, state, parts)
            return (optax.apply_updates(parts, updates), state), None

        (made, _), _ = jax.lax.scan(step, (made, optimizer.init(made)), None, length=warmup)
    return ParameterParts(made, gates)


def clip_parts(longest: float) -> optax.GradientTransformation:
    """The gradient of the parts cut to a length, all together; that of the gates as it is."""

    def update(gradient: PyTree, state: PyTree, parameters: PyTree = None) -> tuple[PyTree, PyTree]:
        length = optax.global_norm(gradient.parts)
        scale = jnp.minimum(1.0, longest / (length + 1e-6))
        return eqx.tree_at(lambda g: g.parts, gradient, jax.tree.map(lambda leaf: leaf * scale, gradient.parts)), state

    return optax.GradientTransformation(lambda parameters: optax.EmptyState(), update)


def reported(
    found: dict[str, Float[Array, ""]],
    importances: dict[str, spd.Importances],
    clean: Clean,
    rest: Float[Array, ""],
) -> Metrics:
    """The terms, the active parts of an input in all matrices (`l0`, g > 0), the share of W that is in no part."""
    one = jnp.ones((), jnp.float32)
    each = [jnp.sum(spd.mean_over_inputs((g.lower > 0) * 1.0, clean.weight)) for g in importances.values()]
    active = jnp.sum(jnp.stack(each))
    metrics = {name: Ratio(value, one) for name, value in found.items()}
    return jax.lax.stop_gradient(metrics | {"l0": Ratio(active, one), "left_over": Ratio(rest, one)})


def as_decomposition(
    learned: ParameterParts,
    model: PyTree,
    site: str,
    target_mean: Float[Array, " d_out"],
    *,
    mask: MaskKind = "rounded",
) -> MLPParts:
    """Parts of the projections of the MLP at `site` (learned with `LeafTarget`) as a decomposition of its output."""
    read = {name: own.read for name, own in learned.parts.items()}
    write = {name: own.write for name, own in learned.parts.items()}
    mlp = select(model, site).get()
    return MLPParts(Lower(learned), read, write, mlp, target_mean, mask, Sites(f"{site}/in", f"{site}/out"))
