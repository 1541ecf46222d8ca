"""Several methods trained in one run, on the same rows of the same forward passes: for comparisons and sweeps.

    state = {name: state of its method},   every method sees the batch that it would have seen alone

`Together({"topk": SparseAutoencoder(k=32), "gated": GatedSparseAutoencoder()})` is a method like any other: `fit`
trains it, checkpoints it and spreads it over a mesh, and its decomposition is a dictionary of decompositions by name.
The model's forward pass, which costs more than most steps, is paid once. All methods start from the same random key,
so that what differs between them is the method. Metrics: `<name>/<metric>`, and `loss`, the sum over methods. With a
glob as site, all methods must be such as take several leaves: `PerLayerTranscoders(...)`, `CrossLayerTranscoder(...)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxinterp.core.batch import Batch, Sites, several
from jaxinterp.core.errors import UserError
from jaxinterp.methods.base import Method, Recipe
from jaxinterp.objectives import Metrics, Ratio


@dataclass(frozen=True)
class Together:
    """Methods by name, all of one leaf, or all of several."""

    methods: Mapping[str, Method]

    def __post_init__(self) -> None:
        """Raises UserError where there is no method, or a name cannot be part of a leaf's name."""
        if not self.methods:
            raise UserError("methods={}: name at least one.")
        for name in self.methods:
            if not name or "/" in name:
                raise UserError(f"methods: {name!r} is no name: it must have letters and no slash.")

    def needs(self, site: Any) -> Sites:
        """The arrays of all methods."""
        each = [method.needs(site) for method in self.methods.values()]
        reads = dict.fromkeys(name for sites in each for name in several(sites.reads))
        writes = dict.fromkeys(name for sites in each for name in several(sites.writes))
        return Sites(tuple(reads), tuple(writes))

    def recipe(self, steps: int) -> Recipe:
        """The recipes of all methods, one after the other."""
        recipes = {name: method.recipe(steps) for name, method in self.methods.items()}

        def start(key: PRNGKeyArray, sample: Batch, model: Any = None) -> dict[str, Any]:
            return {name: one.init(key, self._own(name, sample), model) for name, one in recipes.items()}

        def step(
            states: dict[str, Any], batch: Batch, key: PRNGKeyArray, model: Any = None
        ) -> tuple[dict[str, Any], Metrics]:
            after: dict[str, Any] = {}
            metrics: Metrics = {}
            loss = jnp.zeros(())
            for name, one in recipes.items():
                after[name], own = one.step(states[name], self._own(name, batch), key, model)
                metrics |= {f"{name}/{metric}": value for metric, value in own.items()}
                loss = loss + own["loss"].value()
            return after, metrics | {"loss": Ratio(loss, jnp.ones(()))}

        return Recipe(start, step, lambda states: {name: one.finish(states[name]) for name, one in recipes.items()})

    def _own(self, name: str, batch: Batch) -> Batch:
        """The batch as the method alone would have it."""
        leaves = tuple(dict.fromkeys(array.rpartition("/")[0] for array in several(batch.sites.writes)))
        return replace(batch, sites=self.methods[name].needs(leaves[0] if len(leaves) == 1 else leaves))
