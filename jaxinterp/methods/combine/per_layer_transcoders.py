"""Per-layer transcoders: one decomposition for each of several MLPs, all trained in one run.

    y^l ≈ part_l(x^l),   loss_l as the method has it;   no part sees another

`method` is any method of one leaf: `PerLayerTranscoders(SkipTranscoder(features=4608, k=32))` with site="blocks/*/mlp"
trains a skip transcoder for every MLP. The model's forward pass and the text are shared, and each part is what the
method would have learned on the same rows alone. Metrics: `l0` counts the active features of all layers, `fired` has
layer after layer, every other number is the mean over layers.

Sources: as the method names them; the set of all layers' transcoders is what cross-layer transcoders are compared with
(Ameisen et al. 2025, recalled) and the replacement model of Dunefsky et al. 2024 (arXiv 2406.11944).
"""

from dataclasses import dataclass, field, replace

import jax
from jaxtyping import PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import Method, Recipe
from jaxinterp.core.sites import Site, Sites, as_needs, several
from jaxinterp.decompositions.cross_layer import PerLayer
from jaxinterp.methods.recipes import add_up, one_pass
from jaxinterp.methods.sparse.transcoder import Transcoder
from jaxinterp.objectives import Metrics, Ratio


@dataclass(frozen=True)
class PerLayerTranscoders:
    """A method of one leaf, at several leaves."""

    method: Method = field(default_factory=Transcoder)
    """What is trained at every leaf."""

    def needs(self, site: Site) -> Sites:
        """What the method needs at every leaf.

        Raises:
          UserError: the method reads or writes several arrays at a leaf.
        """
        each = [as_needs(self.method.needs(name)).sites for name in several(site)]
        for sites in each:
            if not (isinstance(sites.reads, str) and isinstance(sites.writes, str)):
                raise UserError(
                    f"method={type(self.method).__name__} reads {sites.reads!r} and writes {sites.writes!r}: take one "
                    "that reads one array of a leaf and writes one."
                )
        return Sites(tuple(str(sites.reads) for sites in each), tuple(str(sites.writes) for sites in each))

    def recipe(self, steps: int) -> Recipe:
        """The method's recipe for every leaf, with a key of its own."""
        one = one_pass(self.method, steps)

        def start(
            key: PRNGKeyArray, sample: Batch, model: PyTree = None, previous: PyTree = None
        ) -> tuple[PyTree, ...]:
            return tuple(one.init(own_key, rows, model) for own_key, rows in _by_layer(key, sample))

        def step(
            states: tuple[PyTree, ...], batch: Batch, key: PRNGKeyArray, model: PyTree = None
        ) -> tuple[tuple[PyTree, ...], Metrics]:
            layers = zip(states, _by_layer(key, batch), strict=True)
            done = [one.step(state, rows, own_key, model) for state, (own_key, rows) in layers]
            return tuple(state for state, _ in done), _mean_of_layers([metrics for _, metrics in done])

        return Recipe(start, step, lambda states: PerLayer(tuple(one.finish(state) for state in states)))


def _by_layer(key: PRNGKeyArray, batch: Batch) -> list[tuple[PRNGKeyArray, Batch]]:
    """A key and the rows of every layer."""
    pairs = list(zip(batch.sites.reads, batch.sites.writes, strict=True))
    keys = jax.random.split(key, len(pairs))
    return [(keys[n], replace(batch, sites=Sites(reads, writes))) for n, (reads, writes) in enumerate(pairs)]


def _mean_of_layers(metrics: list[Metrics]) -> Metrics:
    """Ratios of layers add as those of batches do: the mean over layers, but of `l0`, which is their sum."""
    summed = add_up(metrics)
    if "l0" in summed:
        summed["l0"] = Ratio(summed["l0"].total, metrics[0]["l0"].count)
    return summed
