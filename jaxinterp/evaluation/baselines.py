"""Baselines for the scoreboard, at the same k, from one pass over training tokens.

Everything here is solved, not trained, by the methods of `methods.solved`: means, covariances and least squares are
sums over tokens, solved on the host in float64.

    neurons            nothing but the mean hidden activation
    principal comp.    the k leading eigenvectors of Cov(y)
    best linear map    A = Cov(x)^-1 Cov(x, y)
    random features    E random unit rows, TopK codes c;  [D; b] = argmin |y - c D - b|^2 (+ a small ridge)
"""

from collections.abc import Callable, Mapping

import equinox as eqx
import grain
import jax
from jaxtyping import PyTree

from jaxinterp.core.batch import make_batch
from jaxinterp.core.promotion import ordinary
from jaxinterp.core.protocols import Method, MethodState
from jaxinterp.core.sites import as_needs
from jaxinterp.data.activations import READ, harvest_jit, on_device
from jaxinterp.data.text.load_text import take
from jaxinterp.methods.recipes import one_pass
from jaxinterp.methods.solved.linear_map import LinearMapMethod
from jaxinterp.methods.solved.neurons import NeuronsMethod, own_mlp
from jaxinterp.methods.solved.principal_components import PrincipalComponentsMethod
from jaxinterp.methods.solved.random_features import RandomFeatures
from jaxinterp.models.load import Subject
from jaxinterp.training.progress import counting

MOST_RANDOM_FEATURES = 8192  # their Gram matrix has features^2 entries


@ordinary()
def baselines(
    subject: Subject,
    train: grain.MapDataset,
    site: str,
    *,
    k: int,
    features: int,
    tokens: int = 131_072,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, PyTree]:
    """The four baselines for the MLP at `site`, by name.

    Args:
      train: windows of training text, {"tokens", "weight"}, each `[seq]`.
      k: active neurons, components and random features per token.
      features: number of random features (at most 8192 are used).
      tokens: how much of the text to use.
      progress: show how far it is: a bar on a terminal, elsewhere a line every ten seconds.
    Raises:
      UserError: the leaf is not an MLP of this package, whose neurons have write vectors.
    """
    own_mlp(subject.model, site)
    methods: dict[str, Method] = {
        "neurons": NeuronsMethod(k=k),
        "pca": PrincipalComponentsMethod(k=k),
        "linear": LinearMapMethod(),
        "random features": RandomFeatures(features=min(features, MOST_RANDOM_FEATURES), k=k),
    }
    return solved(methods, subject, train, site, tokens=tokens, seed=seed, progress=progress)


def solved(
    methods: Mapping[str, Method],
    subject: Subject,
    train: grain.MapDataset,
    site: str,
    *,
    tokens: int,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, PyTree]:
    """What solved methods find at a site, by name: one pass over a sample of the text, and one harvest, serves all.

    `fit(method, ...)` takes rows out of a shuffle buffer, which keeps the last ones; here every row counts.

    Args:
      methods: of one pass each, whose steps do not depend on the order of rows.
      train, tokens, seed, progress: as for `baselines`.
    """
    recipes = {name: one_pass(method, 1) for name, method in methods.items()}
    needs = {name: as_needs(method.needs(site)) for name, method in methods.items()}
    steps = {name: _stepped(recipe.step) for name, recipe in recipes.items()}
    wanted = tuple(dict.fromkeys(array for needed in needs.values() for array in needed.names()))
    key = jax.random.key(seed)
    states: dict[str, MethodState] = {}
    batches = take(train, tokens, seed=seed, rows=8)
    # A solution counts as a batch: it takes about as long.
    with counting(
        len(batches) + len(recipes), "solving the baselines", "batches and solutions", shown=progress
    ) as done:
        for number, windows in enumerate(batches):
            done()
            rows = harvest_jit(subject.model, on_device(windows, READ), wanted).flat()
            for name, recipe in recipes.items():
                arrays = {array: rows.arrays[array] for array in needs[name].names()}
                batch = make_batch(arrays, rows.weight, needs[name].sites, step=number)
                if number == 0:
                    states[name] = recipe.init(key, batch, subject.model)
                given = states[name].decomposition, batch, jax.random.fold_in(key, number), subject.model
                states[name] = steps[name](given, (states[name].optimizer, states[name].aux))
        found = {}
        for name, recipe in recipes.items():
            done()
            found[name] = recipe.finish(states.pop(name))  # and its sums are dropped
    return found


def _stepped(step: Callable[..., tuple]) -> Callable[[PyTree, PyTree], MethodState]:
    """The step as a program that adds to the sums where they lie: those of random features have features^2 entries.

    What stays fixed is not taken over: weights of the subject may be in it.
    """

    def stepped(given: PyTree, sums: PyTree) -> MethodState:
        decomposition, batch, key, model = given
        return step(MethodState(decomposition, *sums), batch, key, model)[0]

    jitted: Callable[[PyTree, PyTree], MethodState] = eqx.filter_jit(stepped, donate="all-except-first")
    return jitted
