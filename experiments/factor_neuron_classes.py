"""Neuron classes of a gated model, and what its neurons do: mean-ablation by class against matched neurons.

    python -m experiments.factor_neuron_classes --out runs/classes

Counts the eleven classes of every layer (arXiv 2505.17936). Then puts neurons of one class at their mean (taken over
positions >= 1, applied at positions >= 1) in the late layers, a number at a time, and measures the change of
cross-entropy and of the entropy of the prediction. The control is the same number of orthogonal-output neurons of the
same layers with the nearest activation norm, std(a) |w_out|.

Expected on SmolLM2: orthogonal output 83 %, conditional strengthening 8 %, proportional change 4 %, conditional
weakening 4 %; more weakening than strengthening in late layers only; weakening neurons hurt most per neuron and lower
the entropy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinterp.commands.shell import check_folder, command, folder_of_a_run, say, settings_of, write_json
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.methods.factor import neuron_classes as classes
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.report.sections import Chart, Section, write_page
from jaxinterp.report.stacked import stacked_bars

GROUPS = {
    "strengthening": ("strengthening", "atypical strengthening"),
    "conditional strengthening": ("conditional strengthening", "atypical conditional strengthening"),
    "proportional change": ("proportional change", "atypical proportional change"),
    "weakening": ("weakening", "atypical weakening"),
    "conditional weakening": ("conditional weakening", "atypical conditional weakening"),
}
"""Typical and atypical neurons together: alone, some are too few."""


@dataclass(frozen=True)
class Config:
    """One model, one text."""

    out: Path
    """Folder for the results; must be empty or absent."""
    model: str = "smollm2-135m"
    """A model with gated MLPs."""
    text: str = "docs"
    """Text that activations and cross-entropies are measured on."""
    first: int = 18
    """The first layer that is ablated."""
    last: int = 28
    """The last one."""
    neurons: int = 50
    """How many neurons are ablated together."""
    draws: int = 3
    """Random choices of them."""
    windows: int = 8
    """Windows of text."""
    seq: int = 128
    """Their length, in tokens."""
    seed: int = 0
    """Of the choices."""


class ToMean(eqx.Module):
    """The edit that puts chosen neurons at their mean, at positions >= 1."""

    chosen: Float[Array, " neurons"]
    mean: Float[Array, " neurons"]

    def __call__(self, hidden: Float[Array, "batch seq neurons"]) -> Float[Array, "batch seq neurons"]:
        edited = jnp.where(self.chosen > 0, self.mean.astype(hidden.dtype), hidden)
        return edited.at[:, 0].set(hidden[:, 0])


@eqx.filter_jit
def measured(model: Any, tokens: Any, chosen: dict[str, Array], means: dict[str, Array]) -> tuple[Array, Array]:
    """(cross-entropy, entropy of the prediction), means over predictions of a window, in nats."""
    edits = {name: ToMean(chosen[name], means[name]) for name in chosen}
    log_p = jax.nn.log_softmax(run(model, tokens, edits=edits).logits[:, 1:-1].astype(jnp.float32))
    loss = -jnp.take_along_axis(log_p, tokens[:, 2:, None], axis=-1)
    return jnp.mean(loss), jnp.mean(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1))


@eqx.filter_jit
def spread(model: Any, tokens: Any, names: tuple[str, ...]) -> dict[str, tuple[Array, Array]]:
    """Mean and standard deviation of every neuron over positions >= 1."""
    trace = run(model, tokens)
    rows = {name: trace[name][:, 1:].reshape(-1, trace[name].shape[-1]) for name in names}
    return {name: (jnp.mean(r, axis=0), jnp.std(r, axis=0)) for name, r in rows.items()}


def main(config: Config) -> None:
    """Count, ablate, write `results.json`."""
    check_folder(config.out, settings_of(config), resume=False)
    subject = load(config.model)
    _, heldout = load_text(config.text, subject.tokenizer, seq=config.seq, max_tokens=400_000)
    tokens = jnp.asarray(take(heldout, config.windows * config.seq, rows=config.windows)[0]["tokens"])
    vectors = classes.model_vectors(subject.model)
    found = {leaf: np.asarray(classes.classify(classes.cosines(own))) for leaf, own in vectors.items()}
    layers = [{name: int(number) for name, number in classes.counts(own).items()} for own in found.values()]
    total = sum(sum(layer.values()) for layer in layers)
    shares = {name: sum(layer[name] for layer in layers) / total for name in classes.NAMES.values()}
    low, high = classes.random_region(next(iter(vectors.values())).read.shape[1])
    beyond = [
        float(np.mean(np.asarray(classes.cosines(own).read_write) < low)) for own in vectors.values()
    ]  # the share of significantly negative neurons of a layer
    leaves = [f"blocks/{layer}/mlp" for layer in range(config.first, config.last + 1)]
    hidden = tuple(f"{leaf}/hidden" for leaf in leaves)
    stats = spread(subject.model, tokens, hidden)
    means = {name: stats[name][0] for name in hidden}
    norms = np.stack(
        [
            np.asarray(stats[name][1]) * np.linalg.norm(np.asarray(vectors[leaf].write), axis=1)
            for leaf, name in zip(leaves, hidden, strict=True)
        ]
    )
    rng = np.random.default_rng(config.seed)

    def ablate(pairs: list[tuple[int, int]]) -> tuple[float, float]:
        chosen = {name: np.zeros(norms.shape[1], np.float32) for name in hidden}
        for layer, neuron in pairs:
            chosen[hidden[layer]][neuron] = 1
        loss, entropy = measured(subject.model, tokens, {k: jnp.asarray(v) for k, v in chosen.items()}, means)
        return float(loss), float(entropy)

    clean = ablate([])
    orthogonal = [set(classes.members(found[leaf], "orthogonal output").tolist()) for leaf in leaves]
    rows = []
    for group, names in GROUPS.items():
        pool = [
            (layer, int(neuron))
            for layer, leaf in enumerate(leaves)
            for name in names
            for neuron in classes.members(found[leaf], name)
        ]
        for draw in range(config.draws):
            size = min(config.neurons, len(pool))
            if size == 0:
                continue
            pairs = [pool[i] for i in rng.choice(len(pool), size, replace=False)]
            matched, used = [], [set[int]() for _ in leaves]
            for layer, neuron in pairs:
                free = sorted(orthogonal[layer] - used[layer])
                nearest = free[int(np.argmin(np.abs(np.log(norms[layer, free] / norms[layer, neuron]))))]
                used[layer].add(nearest)
                matched.append((layer, nearest))
            loss, entropy = ablate(pairs)
            control, control_entropy = ablate(matched)
            rows.append(
                {
                    "class": group, "draw": draw, "neurons": size, "pool": len(pool),
                    "delta_ce": loss - clean[0], "delta_entropy": entropy - clean[1],
                    "matched_delta_ce": control - clean[0], "matched_delta_entropy": control_entropy - clean[1],
                }
            )  # fmt: skip
            say(str(rows[-1]))
    record = settings_of(config)
    with folder_of_a_run(config.out, record) as out:
        results = {"shares": shares, "layers": layers, "significantly_negative": beyond, "region": [low, high]}
        write_json(out / "results.json", results | {"clean_ce": clean[0], "clean_entropy": clean[1], "ablations": rows})
        chart = class_chart(layers)
        path = write_page(
            out / "report.html",
            title=f"{config.model}: neuron classes",
            subtitle=f"{total:,} neurons of {len(layers)} layers",
            summary=f"{shares['orthogonal output']:.1%} write orthogonally to what they read.",
            sections=[Section("Classes by layer", charts=(chart,), wide=True), Section("Ablations", (), tuple(rows))],
            facts={name: str(value) for name, value in record.items()},
        )
        say(f"Page: {path}")
    say(str({name: round(share, 4) for name, share in shares.items()}))


def class_chart(layers: Sequence[Mapping[str, int]]) -> Chart:
    """Neurons of every class but the orthogonal ones, layer by layer."""
    values = {name: [layer[name] for layer in layers] for name in layers[0] if name != "orthogonal output"}
    title = "Neurons by class and layer"
    svg = stacked_bars(values, x_label="layer", y_label="neurons", title=title)
    return Chart(title, "Neurons whose output is orthogonal to their input are left out: they are the most.", svg)


if __name__ == "__main__":
    command(Config, main, __doc__)
