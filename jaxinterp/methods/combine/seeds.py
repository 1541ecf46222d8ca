"""Several seeds of one method in one program, on the same rows: what stability is measured on.

    Seeds(method, 3):   state = (state_0, state_1, state_2),   state_n <- step(state_n, batch, key_n)

The subject's forward pass, the shuffle buffer and the batches are shared; start values and everything else random are
each seed's own. Number 0 is what the method trains without `Seeds`; `Seeds(method, 1, first=2)` is number 2 alone. What
is trained is a tuple of decompositions, one a seed: `jaxinterp.evaluation.stability` compares them.

The seeds stand beside each other in the program, not on an axis of a `vmap`: leaves keep the shapes, names and places
on a mesh that the method gives them, a kernel's hand-written passes are called as they are, and each seed is to the
last few bits what it is alone. (On a CPU eight sparse steps under `vmap` were slower than one after another.)

Metrics are means over seeds; `fired` has seed after seed.
"""

from dataclasses import dataclass

import jax
from jaxtyping import PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.protocols import Method, Recipe
from jaxinterp.core.sites import Needs, Site, Sites
from jaxinterp.methods.checks import check_whole
from jaxinterp.methods.recipes import add_up, one_pass
from jaxinterp.objectives import Metrics


@dataclass(frozen=True)
class Seeds:
    """A method, several times."""

    method: Method
    """What is trained."""
    count: int = 3
    """How many seeds."""
    first: int = 0
    """The number of the first."""

    def __post_init__(self) -> None:
        """Raises UserError if a number is invalid."""
        check_whole(self, count=1, first=0)

    def needs(self, site: Site) -> Needs | Sites:
        """What the method needs."""
        return self.method.needs(site)

    def recipe(self, steps: int) -> Recipe:
        """The method's recipe for every seed, with a key of its own; `finish` gives a tuple of decompositions."""
        one = one_pass(self.method, steps)

        def start(
            key: PRNGKeyArray, sample: Batch, model: PyTree = None, previous: PyTree = None
        ) -> tuple[PyTree, ...]:
            return tuple(one.init(own, sample, model) for own in self._keys(key))

        def step(
            states: tuple[PyTree, ...], batch: Batch, key: PRNGKeyArray, model: PyTree = None
        ) -> tuple[tuple[PyTree, ...], Metrics]:
            pairs = zip(states, self._keys(key), strict=True)
            done = [one.step(state, batch, own, model) for state, own in pairs]
            return tuple(state for state, _ in done), add_up([metrics for _, metrics in done])

        return Recipe(start, step, lambda states: tuple(one.finish(state) for state in states), one.init_on)

    def _keys(self, key: PRNGKeyArray) -> list[PRNGKeyArray]:
        """Number 0 has the key itself."""
        numbers = range(self.first, self.first + self.count)
        return [key if number == 0 else jax.random.fold_in(key, number) for number in numbers]
