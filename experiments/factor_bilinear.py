"""Spectra of a bilinear language model: are its interaction matrices of low rank, and lower than chance?

Pearce et al. 2024 (arXiv 2410.08417) read a bilinear MLP's features off the eigenvectors of its interaction matrices,
and report that a few eigenvectors carry most of what an output direction reacts to. Here: the directions that write
token logits, in every layer of `bilinear-4x128`, against random directions and against shuffled weights; and the
directions that the higher-order SVD finds, which carry most of the layer's tensor, without any choice of outputs.

Command: python -m experiments.factor_bilinear --out runs/factor_bilinear

For each layer and each kind of direction: the mean effective rank (of d_model), the mean share of sum lambda^2 that the
two eigenvectors of largest |lambda| carry, and the correlation over held-out tokens of the two-eigenvector (and of the
two best neurons') output with the whole.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinterp.commands.shell import (
    Columns,
    check_folder,
    check_positive,
    command,
    print_table,
    say,
    settings_of,
    write_json,
)
from jaxinterp.core.errors import UserError
from jaxinterp.data.text.load_text import load_text
from jaxinterp.methods.factor.bilinear import (
    bilinear,
    effective_rank,
    eigen_terms,
    higher_order_svd,
    interaction_matrix,
    output_gram,
    spectrum,
)
from jaxinterp.models.load import load
from jaxinterp.models.mlp import MLP
from jaxinterp.models.run import run


@dataclass(frozen=True)
class Config:
    """One bilinear model."""

    out: Path
    """Folder for the results; must be empty or absent."""
    model: str = "bilinear-4x128"
    """A model whose MLPs are bilinear."""
    directions: int = 64
    """Tokens whose logit directions are taken, and random directions."""
    tokens: int = 2048
    """Held-out tokens for correlations."""
    text: str = "docs"
    """Text of the tokens."""
    seed: int = 0
    """Of random directions, of the shuffling and of the tokens."""


def main(config: Config) -> None:
    """Spectra, layer by layer."""
    clock = time.perf_counter()
    check_positive(config, "directions", "tokens")
    check_folder(config.out, settings_of(config), resume=False)
    subject = load(config.model)
    model: Any = subject.model
    for index, block in enumerate(model.blocks):
        if not isinstance(block.mlp, MLP) or block.mlp.gate_proj is None or block.mlp.activation != "identity":
            raise UserError(f"model={config.model!r}: the MLP of block {index} is not bilinear: take bilinear-4x128.")
    _, heldout = load_text(config.text, subject.tokenizer, seq=256, max_tokens=40 * config.tokens)
    windows: Any = [heldout[index] for index in range(max(1, config.tokens // 256))]
    trace = run(model, jnp.asarray(np.stack([window["tokens"] for window in windows])), keep="blocks/*/mlp/in")
    draw = np.random.default_rng(config.seed)
    head = model.embedding.token.T if model.unembedding is None else model.unembedding.weight
    d, vocabulary = head.shape
    logits = head.T[draw.choice(vocabulary, config.directions, replace=False)]
    random = jnp.asarray(draw.normal(size=(config.directions, d)), jnp.float32)
    rows: list[dict[str, Any]] = []
    carried: dict[int, tuple[float, float]] = {}
    for index, block in enumerate(model.blocks):
        x = trace[f"blocks/{index}/mlp/in"].reshape(-1, d).astype(jnp.float32)
        weights = tuple(
            p.weight.astype(jnp.float32) for p in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)
        )
        shuffled = tuple(jnp.asarray(draw.permutation(np.asarray(w).ravel()).reshape(w.shape)) for w in weights)
        for name, of, directions in (
            ("logits", weights, logits),
            ("random", weights, random),
            ("logits, shuffled weights", shuffled, logits),
            (
                "higher-order SVD",
                weights,
                higher_order_svd(weights[0], weights[1], weights[2], config.directions).directions,
            ),
        ):
            found = np.asarray(jax.lax.map(lambda u, of=of, x=x: measure(of, u, x), directions)).mean(0)
            rows.append({"layer": index, "directions": name} | dict(zip(KEYS, map(float, found), strict=True)))
        carried[index] = leading(weights), leading(shuffled)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "results.json", {"rows": rows, "carried": carried})
    for index, (own, chance) in carried.items():
        say(f"layer {index}: 16 directions carry {own:.3f} of the square; shuffled {chance:.3f}")
    print_table(COLUMNS, rows)
    say(f"{config.directions} directions a row, {x.shape[0]:,} tokens; {time.perf_counter() - clock:.0f} s.")


KEYS = ("rank", "share", "two", "eight", "neurons")
COLUMNS: Columns = {
    "layer": ("layer", "{:d}"),
    "directions": ("directions", "{}"),
    "eff. rank": ("rank", "{:.1f}"),
    "top-2 share": ("share", "{:.3f}"),
    "corr. 2": ("two", "{:.2f}"),
    "corr. 8": ("eight", "{:.2f}"),
    "2 neurons": ("neurons", "{:.2f}"),
}


def leading(weights: tuple[Array, ...], number: int = 16) -> float:
    """The share of the tensor's square that its leading output directions carry."""
    squares = jnp.sort(jnp.linalg.eigvalsh(output_gram(*weights)))[::-1]
    return float(jnp.sum(squares[:number]) / jnp.sum(squares))


def measure(weights: tuple[Array, ...], direction: Array, x: Array) -> Array:
    """Effective rank, top-2 share, correlations with the whole of 2 and 8 eigenvectors and of the 2 best neurons."""
    left, right, down = weights
    found = spectrum(interaction_matrix(left, right, down, direction))
    whole = bilinear(x, left, right, down) @ direction
    terms = eigen_terms(x, found)
    neurons = (x @ left) * (x @ right) * (down @ direction)
    best = jax.lax.top_k(jnp.var(neurons, axis=0), 2)[1]
    squares = found.values**2
    correlation = lambda part: jnp.corrcoef(part, whole)[0, 1]
    return jnp.stack(
        [
            effective_rank(found.values),
            jnp.sum(squares[:2]) / jnp.sum(squares),
            correlation(jnp.sum(terms[:, :2], axis=1)),
            correlation(jnp.sum(terms[:, :8], axis=1)),
            correlation(jnp.sum(neurons[:, best], axis=1)),
        ]
    )


if __name__ == "__main__":
    command(Config, main, __doc__)
