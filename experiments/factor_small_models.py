"""Small language models trained here: do ReLU experts sparsify (MoE-X), and can a domain be masked out (Monet)?

    python -m experiments.factor_small_models --out runs/small                      (both parts)
    python -m experiments.factor_small_models --out runs/monet --parts monet

moe_x. Yang et al. 2025 (arXiv 2503.07639) say that of MoE-X's two changes to a mixture, ReLU experts and a router that
prefers sparse experts, ReLU is most of the gain in interpretability. Here at equal active parameters: dense GELU and
ReLU models, and mixtures with an ordinary or the sparsity-aware router and GELU or ReLU experts. Measured on held-out
text: cross-entropy, neurons used by a token, and coverage: how well the best neuron of the last but one layer tells
which of the 20 most frequent tokens came before this one.

monet. Park et al. 2024 (arXiv 2412.04139) remove knowledge of a domain by masking its experts. A model is trained on
two texts; an expert (i, j) belongs to the domain whose share of its routing mass is at least twice the other's. Masking
a domain's experts should raise its own loss more than the other's. Baseline: a dense ReLU model, whose neurons are
assigned by activation share and zeroed.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments import train_language_model as small
from experiments.own_text import Text, text_of
from jaxinterp.commands.shell import (
    Columns,
    check_folder,
    command,
    folder_of_a_run,
    print_table,
    say,
    settings_of,
    write_json,
)
from jaxinterp.data.activations import counted, on_device
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.data.windows import windows
from jaxinterp.decompositions.components import Scale
from jaxinterp.evaluation.coverage import coverage, used
from jaxinterp.models.load import Subject
from jaxinterp.models.mixtures.moe_x import MoEX
from jaxinterp.models.mlp import MLP
from jaxinterp.models.run import run
from jaxinterp.training.fit import fit

Part = Literal["moe_x", "monet"]
Part_of_text = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """The defaults take some ten minutes of two cores."""

    out: Path
    """Folder for the results; must be empty or absent."""
    parts: tuple[Part, ...] = ("moe_x", "monet")
    """Which of the two."""
    text: str = "docs"
    """Text of the first part, and the first domain of the second."""
    other: str = "kjv"
    """The second domain."""
    layers: int = 4
    """Blocks."""
    d_model: int = 64
    """Width."""
    d_mlp: int = 256
    """Active neurons of every model of the first part."""
    vocabulary: int = 1024
    """Ids of the tokenizer."""
    steps: int = 300
    """Training steps."""
    batch_size: int = 1024
    """Tokens a step."""
    seq: int = 128
    """Length of a window."""
    heldout_tokens: int = 16_384
    """Held-out tokens, of each domain."""
    seed: int = 0
    """Of start values and data order."""


def recipe(config: Config, kind: Any, text: str, **sizes: Any) -> small.Config:
    """The settings of a model."""
    shared = {name: getattr(config, name) for name in ("layers", "d_model", "vocabulary", "seq", "batch_size", "seed")}
    options = {"d_mlp": config.d_mlp} | sizes
    return small.Config(
        out=config.out, mlp=kind, text=text, tokens=config.steps * config.batch_size, **shared, **options
    )


def trained(config: Config, settings: small.Config, text: Text, activation: Any = None) -> Any:
    """A model after training; `activation`: of experts, in place of the kind's own."""
    start = small.start_model(small.shape_of(settings), config.seed)
    if activation is not None:
        start = eqx.tree_at(
            lambda model: [block.mlp for block in model.blocks],
            start,
            [replace(block.mlp, activation=activation) for block in start.blocks],
        )
    result = fit(
        small.method_of(settings),
        Subject(start, text.tokenizer, str(settings.mlp)),
        windows(text.train, config.seq),
        steps=config.steps,
        batch_size=config.batch_size,
        buffer_batches=1,
        seed=config.seed,
    )
    return result.decomposition


def heldout(text: Any, config: Config) -> Part_of_text:
    """A sample of windows as one batch."""
    rows = config.heldout_tokens // config.seq
    batch = take(text, config.heldout_tokens, rows=rows)[0]
    return on_device(batch)


@eqx.filter_jit
def cross_entropy(model: Any, batch: Part_of_text, edits: dict[str, Scale]) -> Float[Array, ""]:
    """Of the next tokens that count, in nats."""
    log_p = jax.nn.log_softmax(run(model, batch["tokens"], edits=edits).logits[:, :-1])
    nll = -jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    counts = counted(batch)
    return jnp.sum(nll * counts) / jnp.sum(counts)


def relu_ablation(config: Config, out: Path) -> list[dict[str, Any]]:
    """A row for every variant."""
    text = text_of(config.text, config.vocabulary, out)
    batch = heldout(windows(text.heldout, config.seq), config)
    mixture = {"d_mlp": config.d_mlp // 2, "experts": 8, "active": 2}
    variants: list[tuple[str, Any, dict[str, Any], Any]] = [
        ("dense, GELU", "gelu", {}, None),
        ("dense, ReLU", "relu", {}, None),
        ("mixture, GELU", "switch", mixture, "gelu"),
        ("mixture, ReLU", "switch", mixture, "relu"),
        ("sparsity router, GELU", "moe_x", mixture, "gelu"),
        ("sparsity router, ReLU (MoE-X)", "moe_x", mixture, "relu"),
    ]
    rows: list[dict[str, Any]] = []
    for name, kind, sizes, activation in variants:
        model = trained(config, recipe(config, kind, config.text, **sizes), text, activation)
        rows.append({"model": name} | neurons_of(model, batch) | {"ce": float(cross_entropy(model, batch, {}))})
        say(str(rows[-1]))
    return rows


def neurons_of(model: Any, batch: Part_of_text) -> dict[str, float]:
    """Neurons in all, not 0, used, of a token and layer; coverage of the last but one layer."""
    layers = [f"blocks/{i}/mlp/hidden" for i in range(len(model.blocks))]
    hidden = eqx.filter_jit(lambda model, tokens: [run(model, tokens)[name] for name in layers])(model, batch["tokens"])
    before, now = batch["tokens"][:, :-1].reshape(-1), hidden[-2][:, 1:].reshape(-1, hidden[-2].shape[-1])
    frequent = jnp.argsort(-jnp.bincount(before, length=int(before.max()) + 1))[:20]
    return {
        "neurons": hidden[0].shape[-1],
        "not 0": float(np.mean([jnp.mean(jnp.sum(h != 0, axis=-1)) for h in hidden])),
        "used": float(np.mean([jnp.mean(used(h)) for h in hidden])),
        "coverage": float(coverage(now, before[:, None] == frequent)),
    }


Masks = dict[str, Float[Array, "..."]]


def masses(model: Any, batch: Part_of_text) -> Masks:
    """Mean over tokens of an expert's routing weight, or of a neuron's |activation|, by the name of the array."""

    @eqx.filter_jit
    def measure(model: Any, tokens: Array) -> Masks:
        trace = run(model, tokens)
        found = {}
        for index, block in enumerate(model.blocks):
            dense = isinstance(block.mlp, MLP | MoEX)
            name = f"blocks/{index}/mlp/{'hidden' if dense else 'experts/pairs'}"
            found[name] = jnp.mean(jnp.abs(trace[name]), axis=(0, 1))
        return found

    return measure(model, batch["tokens"])


def masked_domains(model: Any, batches: dict[str, Part_of_text]) -> list[dict[str, Any]]:
    """For every domain: how many experts (neurons) are its own, what share of its mass, and what masking them costs."""
    mass = {name: masses(model, batch) for name, batch in batches.items()}
    clean = {name: float(cross_entropy(model, batch, {})) for name, batch in batches.items()}
    rows = []
    for name, other in (tuple(batches), tuple(batches)[::-1]):
        own = {site: mass[name][site] >= 2 * mass[other][site] for site in mass[name]}
        edits = {site: Scale(1.0 - mask) for site, mask in own.items()}
        total = sum(float(jnp.sum(m)) for m in mass[name].values())
        rows.append(
            {
                "masked": name,
                "experts": sum(int(jnp.sum(mask)) for mask in own.values()),
                "of": sum(mask.size for mask in own.values()),
                "mass": sum(float(jnp.sum(mass[name][site] * mask)) for site, mask in own.items()) / total,
                "own": float(cross_entropy(model, batches[name], edits)) - clean[name],
                "others": float(cross_entropy(model, batches[other], edits)) - clean[other],
            }
        )
    return rows


def domains(config: Config, out: Path) -> list[dict[str, Any]]:
    """Rows of the Monet model and of the dense one."""
    both = f"{config.text}:0.5+{config.other}:0.5"
    text = text_of(both, config.vocabulary, out)
    batches = {}
    for name in (config.text, config.other):
        _, rest = load_text(name, text.tokenizer, seq=config.seq, max_tokens=30 * config.heldout_tokens)
        batches[name] = heldout(rest, config)
    rows = []
    variants: list[tuple[str, Any, dict[str, Any]]] = [
        ("Monet", "monet_horizontal", {"experts": 16, "active": 4, "d_mlp": 16, "routers": 4}),
        ("dense ReLU", "relu", {}),
    ]
    for name, kind, sizes in variants:
        model = trained(config, recipe(config, kind, both, **sizes), text)
        clean = {f"ce {domain}": float(cross_entropy(model, batch, {})) for domain, batch in batches.items()}
        rows += [{"model": name} | row | clean for row in masked_domains(model, batches)]
        say(*map(str, rows[-2:]))
    return rows


RELU: Columns = {
    "model": ("model", "{}"),
    "CE": ("ce", "{:.3f}"),
    "neurons": ("neurons", "{:d}"),
    "not 0": ("not 0", "{:.0f}"),
    "used": ("used", "{:.1f}"),
    "coverage": ("coverage", "{:.3f}"),
}
MASKED: Columns = {
    "model": ("model", "{}"),
    "masked": ("masked", "{}"),
    "experts": ("experts", "{:d}"),
    "of": ("of", "{:d}"),
    "mass": ("mass", "{:.3f}"),
    "own loss": ("own", "{:+.3f}"),
    "other loss": ("others", "{:+.3f}"),
}


def main(config: Config) -> None:
    """Train, measure, write `results.json`."""
    check_folder(config.out, settings_of(config), resume=False)
    results: dict[str, Any] = {}
    with folder_of_a_run(config.out, settings_of(config)) as out:
        for part in config.parts:
            (out / part).mkdir(exist_ok=True)
            results[part] = relu_ablation(config, out / part) if part == "moe_x" else domains(config, out / part)
            print_table(RELU if part == "moe_x" else MASKED, results[part])
            write_json(out / "results.json", results)


if __name__ == "__main__":
    command(Config, main, __doc__)
