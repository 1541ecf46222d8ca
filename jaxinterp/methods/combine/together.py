"""Several methods trained in one run, on the same rows of the same forward passes: for comparisons and sweeps.

    state = {name: state of its method},   every method sees the batch that it would have seen alone

`Together({"topk": SparseAutoencoder(k=32), "gated": GatedSparseAutoencoder()})` is a method like any other: `fit`
trains it, checkpoints it and spreads it over a mesh, and its decomposition is a dictionary of decompositions by name.
The model's forward pass, which costs more than most steps, is paid once. All methods start from the same random key,
so that what differs between them is the method. Metrics: `<name>/<metric>`, and `loss`, the sum over methods. With a
glob as site, all methods must be such as take several leaves: `PerLayerTranscoders(...)`, `CrossLayerTranscoder(...)`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.metrics import Metrics, Ratio
from jaxinterp.core.protocols import Method, Recipe
from jaxinterp.core.sites import Names, Needs, Site, as_needs, several
from jaxinterp.methods.recipes import one_pass


@dataclass(frozen=True)
class Together:
    """Methods by name, all of one leaf, or all of several."""

    methods: Mapping[str, Method]

    def __post_init__(self) -> None:
        """Raises UserError if there is no method, or a name cannot be part of a leaf's name."""
        if not self.methods:
            raise UserError("methods={}: name at least one.")
        for name in self.methods:
            if not name or "/" in name:
                raise UserError(f"methods: invalid name {name!r}: it must have letters and no slash.")

    def needs(self, site: Site) -> Needs:
        """The arrays of all methods.

        Raises:
          UserError: some of them stream rows, others keep them or take none.
        """
        each = [as_needs(method.needs(site)) for method in self.methods.values()]
        rows = {needs.rows for needs in each}
        if len(rows) > 1:
            wanted = ", ".join(f"{name}: {needs.rows}" for name, needs in zip(self.methods, each, strict=True))
            raise UserError(f"methods take their rows in different ways ({wanted}): train them apart.")

        def union(names: Iterable[Names]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(name for one in names for name in several(one)))

        return Needs(
            union(needs.reads for needs in each),
            union(needs.writes for needs in each),
            union(needs.gradients for needs in each),
            any(needs.windows for needs in each),
            each[0].rows,
        )

    def recipe(self, steps: int) -> Recipe:
        """The recipes of all methods, one after the other."""
        recipes = {name: one_pass(method, steps) for name, method in self.methods.items()}

        def start(key: PRNGKeyArray, sample: Batch, model: PyTree = None, previous: PyTree = None) -> dict[str, PyTree]:
            return {name: one.init(key, self._own(name, sample), model) for name, one in recipes.items()}

        def step(
            states: dict[str, PyTree], batch: Batch, key: PRNGKeyArray, model: PyTree = None
        ) -> tuple[dict[str, PyTree], Metrics]:
            after: dict[str, PyTree] = {}
            metrics: Metrics = {}
            losses: list[Array] = []
            for name, one in recipes.items():
                after[name], own = one.step(states[name], self._own(name, batch), key, model)
                metrics |= {f"{name}/{metric}": value for metric, value in own.items()}
                losses += [own["loss"].value()] if "loss" in own else []
            return after, metrics | (
                {"loss": Ratio(sum(losses, jnp.zeros((), jnp.float32)), jnp.ones((), jnp.float32))} if losses else {}
            )

        def finish(states: dict[str, PyTree]) -> dict[str, PyTree]:
            return {name: one.finish(states[name]) for name, one in recipes.items()}

        on_host = any(one.init_on == "host" for one in recipes.values())
        return Recipe(start, step, finish, "host" if on_host else "device")

    def _own(self, name: str, batch: Batch) -> Batch:
        """The batch as the method alone would have it."""
        leaves = tuple(dict.fromkeys(array.rpartition("/")[0] for array in several(batch.sites.writes)))
        return replace(batch, sites=as_needs(self.methods[name].needs(leaves[0] if len(leaves) == 1 else leaves)).sites)
