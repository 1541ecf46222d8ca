"""Are MLPs hidden mixtures of experts? The error of students with experts over that of dense ones, real against twin.

    python -m experiments.factor_experts --out runs/experts                        # a trained model's MLP
    python -m experiments.factor_experts --out runs/toy --problem toy              # a random MLP, planted inputs

Students of as many active neurons (dense: 2k; with experts: k shared + k of N) learn the MLP on real inputs, and on the
Gaussian twin: inputs with the same mean and covariance, put through the same MLP (arXiv 2512.18452). The statistic is
the ratio of their FVUs on held-out inputs. Expected: clearly lower on real inputs. Both routers are trained, with each
of the two starts of write vectors that the authors' two students differ in.

Toy: inputs are sums of 3 of 256 unit vectors with sizes 1 + Exp(1); the MLP is random, 32 -> 128 -> 32.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.commands.shell import check_folder, command, folder_of_a_run, say, settings_of, write_json
from jaxinterp.core.batch import Sites
from jaxinterp.core.protocols import Method
from jaxinterp.data.activations import harvested
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.evaluation.planted.laboratory import train
from jaxinterp.methods.factor import experts
from jaxinterp.models.load import load
from jaxinterp.models.sites import select
from jaxinterp.models.tiny import unit_rows

SITES = Sites("x", "y")
HELD_OUT = 8192


@dataclass(frozen=True)
class Config:
    """One MLP, real inputs and their twin."""

    out: Path
    """Folder for the results; must be empty or absent."""
    problem: Literal["model", "toy"] = "model"
    """A trained model's MLP, or a random one on planted inputs."""
    model: str = "bilinear-4x128"
    """The model."""
    site: str = "blocks/2/mlp"
    """Its MLP."""
    text: str = "docs"
    """Where inputs come from."""
    inputs: int = 100_000
    """How many inputs there are; the last 8,192 are held out."""
    experts: int = 4096
    """N."""
    k: int = 8
    """Experts per token, and shared neurons; the dense student has twice as many neurons."""
    rank: int = 16
    """Rank of the low-rank router."""
    steps: int = 1500
    """Of Adam, with batches of 512."""
    learning_rate: float = 5e-3
    """Peak of Adam."""
    both_starts: bool = True
    """Whether the other start of write vectors is trained too."""
    seed: int = 0
    """Of everything random."""


def toy_inputs(key: Array, number: int) -> tuple[Float[Array, "inputs d"], Any]:
    """Dictionary-sparse inputs [number, 32] and a random MLP."""
    rows_key, choice_key, size_key, mlp_key = jax.random.split(key, 4)
    rows = unit_rows(rows_key, 256, 32)
    chosen = jax.lax.top_k(jax.random.uniform(choice_key, (number, 256)), 3)[1]
    sizes = 1 + jax.random.exponential(size_key, (number, 3))
    x = jnp.einsum("nk,nkd->nd", sizes, rows[chosen])
    one, two = jax.random.split(mlp_key)
    up, down = jax.random.normal(one, (32, 128)) / 32**0.5, jax.random.normal(two, (128, 32)) / 128**0.5
    return x, lambda x: experts.gelu(x @ up) @ down


def model_inputs(config: Config) -> tuple[Float[Array, "inputs d"], Any]:
    """What an MLP reads on text, and the MLP."""
    subject = load(config.model)
    train_text, _ = load_text(config.text, subject.tokenizer, seq=256, max_tokens=4 * config.inputs)
    name = f"{config.site}/in"
    x = harvested(subject.model, take(train_text, config.inputs * 5 // 4, rows=16), (name,))[name]
    return x[: config.inputs], select(subject.model, config.site).get()


def students(config: Config) -> dict[str, Method]:
    """The dense student, and both routers with both starts."""
    settings = {"experts": config.experts, "k": config.k, "shared": config.k, "learning_rate": config.learning_rate}
    found: dict[str, Method] = {"dense": experts.DenseRival(neurons=2 * config.k, learning_rate=config.learning_rate)}
    starts: tuple[experts.WriteStart, ...] = ("k", "experts") if config.both_starts else ("k",)
    for start in starts:
        for name, rank in (("low rank", config.rank), ("full", None)):
            found[f"{name}, start {start}"] = experts.HiddenExperts(rank=rank, write_start=start, **settings)  # type: ignore[arg-type]
    return found


def errors(config: Config, methods: dict[str, Method], x: Array, mlp: Any) -> dict[str, dict[str, float]]:
    """FVU of every student on held-out real inputs and on a held-out part of the twin."""
    mean, covariance = experts.twin_moments(x)
    normal = jax.random.normal(jax.random.key(config.seed), x.shape)
    found: dict[str, dict[str, float]] = {}
    for kind, inputs in (("real", x), ("twin", experts.gaussian_twin(normal, mean, covariance))):
        outputs = eqx.filter_jit(lambda mlp, x: mlp(x))(mlp, inputs)
        data = (inputs[:-HELD_OUT], outputs[:-HELD_OUT])

        def draw(given: Any, key: Any, size: int) -> dict[str, Array]:
            chosen = jax.random.randint(key, (size,), 0, given[0].shape[0])
            return {"x": given[0][chosen], "y": given[1][chosen]}

        for name, method in methods.items():
            learned, _ = train(method, draw, [data], SITES, steps=config.steps, batch_size=512, seed=config.seed)
            fvu, _ = experts.unexplained(learned[0](inputs[-HELD_OUT:]), outputs[-HELD_OUT:])
            found.setdefault(name, {})[kind] = float(fvu)
            say(f"{name}, {kind}: FVU {float(fvu):.4f}")
    return found


def main(config: Config) -> None:
    """Train, compare, write `results.json`."""
    check_folder(config.out, settings_of(config), resume=False)
    x, mlp = toy_inputs(jax.random.key(config.seed), config.inputs) if config.problem == "toy" else model_inputs(config)
    found = errors(config, students(config), x, mlp)
    dense = found["dense"]
    ratios = {name: {kind: row[kind] / dense[kind] for kind in row} for name, row in found.items()}
    say(*(f"{name}: ratio real {row['real']:.3f}, twin {row['twin']:.3f}" for name, row in ratios.items()))
    with folder_of_a_run(config.out, settings_of(config)) as out:
        write_json(out / "results.json", {"fvu": found, "ratios": ratios, "inputs": len(x)})


if __name__ == "__main__":
    command(Config, main, __doc__)
