"""The method APD: parts of all matrices at once, of which those with the largest attributions must do an input's work.

    loss = match * mean |W - sum_c P_c|^2 + output * mean (f(x) - f(x; kept parts))^2 + simple * Schatten penalty

The terms and attributions are those of `attribution_parameters`. Attributions are taken at the target's own weights;
which parts are kept has no gradient. In the forward pass with kept parts, a matrix is the sum of its kept blocks. The
target is a toy model, or one MLP of a language model (`LeafTarget`: outputs in units of their variance); attributions
take the derivative of every output of every input.

Start: A and B normal, scaled so that the sum of all parts has the size of W. Adam; a cosine to 0.

Source: Braun, Bushnaq, Heimersheim, Mendel, Sharkey 2025 (arXiv 2501.14926).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.metrics import Metrics, number
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Needs, Site
from jaxinterp.decompositions.mlp_parts import mlp_linear, mlp_with
from jaxinterp.decompositions.parameter_parts import AttributionParts, Blocks
from jaxinterp.methods.checks import check_not_negative, check_positive, check_whole
from jaxinterp.methods.factor import attribution_parameters as apd
from jaxinterp.methods.factor import parameters as spd
from jaxinterp.methods.factor.targets import LeafTarget, ToyTarget
from jaxinterp.methods.recipes import gradient_method
from jaxinterp.models.sites import select


@dataclass(frozen=True)
class AttributionParameters:
    """APD of a toy model (`evaluation.planted.superposition`) or of one MLP."""

    target: ToyTarget | LeafTarget = field(default_factory=ToyTarget)
    """Which matrices, and how the model is run."""
    parts: int = 5
    """How many."""
    rank: int = 1
    """Of a part in each matrix."""
    k: float = 1.1
    """Parts an input keeps: the k * batch largest attributions of the whole batch."""
    match: float = 1.0
    """Coefficient of the distance of the sum of all parts from the weights."""
    output: float = 1.0
    """Coefficient of the output's error with the kept parts."""
    simple: float = 1e-3
    """Coefficient of the Schatten penalty of the kept parts."""
    p: float = 1.0
    """Its exponent."""
    learning_rate: float = 1e-2
    """Of Adam; a cosine to 0."""

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_whole(self, parts=1, rank=1)
        check_positive(self, "k", "p", "learning_rate")
        check_not_negative(self, "match", "output", "simple")
        if self.k > self.parts:
            raise UserError(f"k={self.k} must be at most parts={self.parts}: an input keeps no more than there are.")

    def needs(self, site: Site = None) -> Needs:
        """What the target reads."""
        return self.target.needs(site)

    def recipe(self, steps: int) -> Recipe:
        """Adam on the three terms."""

        def objective(
            decomposition: AttributionParts, batch: Batch, key: PRNGKeyArray, *, model: PyTree = None
        ) -> tuple[Float[Array, ""], Metrics]:
            return losses(self, decomposition, batch, model)

        optimizer = optax.adam(optax.cosine_decay_schedule(self.learning_rate, steps))
        return gradient_method(lambda key, sample, model: start(self, key, model), objective, optimizer)


Applied = Callable[[Array, Callable[[str, Array], Array]], Array]
"""(x, what takes the place of a matrix: (its name, what it reads) -> what it writes) -> the outputs."""


def function_of(target: ToyTarget | LeafTarget, model: PyTree, batch: Batch) -> Applied:
    """The target's function of its inputs, biases kept, with something in the place of every matrix."""
    if isinstance(target, ToyTarget):
        return lambda x, apply: model(x, apply)
    mlp, unit = select(model, target.site).get(), target.unit(batch)

    def run(x: Array, apply: Callable[[str, Array], Array]) -> Array:
        def linear(name: str, h: Array) -> Array:
            bias = mlp_linear(mlp, name).bias
            return apply(name, h) if bias is None else apply(name, h) + bias

        return mlp_with(mlp, x, linear) / unit

    return run


def losses(
    method: AttributionParameters, decomposition: AttributionParts, batch: Batch, model: PyTree
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of the module's equation, and its terms before their coefficients."""
    blocks, weights = decomposition.blocks, method.target.weights(model)
    function, x = function_of(method.target, model, batch), batch.inputs.astype(jnp.float32)
    mask = kept(method, decomposition, batch, model)
    clean = jax.lax.stop_gradient(function(x, lambda name, h: h @ weights[name]))
    found = function(x, lambda name, h: apd.blocks_linear(h, blocks[name], mask))
    terms = {
        "match": apd.parameter_match(weights, blocks),
        "output": spd.distance(clean, found, "squares", weight=batch.weight),
        "simple": apd.simplicity(blocks, mask, method.p, sum(weight.size for weight in weights.values())),
    }
    loss = method.match * terms["match"] + method.output * terms["output"] + method.simple * terms["simple"]
    return loss, {name: number(jax.lax.stop_gradient(value)) for name, value in terms.items()}


def kept(
    method: AttributionParameters, decomposition: AttributionParts, batch: Batch, model: PyTree
) -> Float[Array, "batch parts"]:
    """1 for the parts that each input keeps; no gradient. Inputs of weight 0 keep none."""
    weights, function = method.target.weights(model), function_of(method.target, model, batch)

    def forward(added: Mapping[str, Array], one: Array) -> Array:
        return function(one, lambda name, h: h @ weights[name] + added[name])

    x, reads = batch.inputs.astype(jnp.float32), method.target.clean(model, batch).reads
    found = apd.attributions(forward, x, reads, jax.lax.stop_gradient(decomposition.blocks))
    counts = (batch.weight > 0)[:, None]
    return jax.lax.stop_gradient(apd.top_k_mask(found * counts, method.k) * counts)


def start(method: AttributionParameters, key: PRNGKeyArray, model: PyTree) -> AttributionParts:
    """The start values of the module's text."""
    blocks = {}
    for name, weight in method.target.weights(model).items():
        key, one, two = jax.random.split(key, 3)
        (d_in, d_out), size = weight.shape, jnp.linalg.norm(weight)
        read = jax.random.normal(one, (method.parts, d_in, method.rank), weight.dtype)
        write = jax.random.normal(two, (method.parts, method.rank, d_out), weight.dtype)
        scale = jnp.sqrt(size / jnp.linalg.norm(jnp.einsum("cim,cmo->io", read, write)))
        blocks[name] = Blocks(read * scale, write * scale)
    return AttributionParts(blocks)
