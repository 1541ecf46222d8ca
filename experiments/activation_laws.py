"""ReLU against SiLU over training: which ends sparser at equal loss, and how massive activations grow meanwhile.

Command: python -m experiments.activation_laws --out runs/laws           2 kinds x 2 seeds, about 17 CPU minutes
         python -m experiments.activation_laws --out runs/laws --resume

Small gated language models that differ in the activation alone are trained on the same text in the same order. At a
dozen steps each is measured on held-out text:

    ce      cross-entropy, nats
    ratio   CETT-PPL-1 %: the share of neurons that must stay for a perplexity at most 1 % higher
    zeros   the share of hidden activations that are 0
    top, median   of the residual stream behind every block: the largest |x| of a window, the lower median of |x|

Then the laws of Sparsing Law (2411.02335) are fitted to ratio over tokens, the five-parameter curve (2508.03616) to
top / median over steps, and ProSparse (2402.13516) is tried: the first SiLU model goes on as a ReLU model, with the L1
penalty staged or constant, at several weights; the two are compared at equal density on held-out text.

Claims: SiLU's ratio rises with data, ReLU's falls and ends lower at comparable loss; the staged schedule costs less
than a constant weight at equal sparsity. Resumable: rows in results.json stay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.own_text import Text, text_of
from experiments.train_language_model import start_model, transformer_of
from jaxinterp.commands.shell import (
    check_folder,
    check_positive,
    command,
    folder_of_a_run,
    read_json,
    say,
    settings_of,
    write_json,
)
from jaxinterp.core.errors import UserError
from jaxinterp.data.activations import counted, on_device
from jaxinterp.data.text.load_text import take
from jaxinterp.data.windows import windows
from jaxinterp.evaluation.sparsity.curves import cett_curves, cett_ppl, hidden_activations
from jaxinterp.evaluation.sparsity.massive import fit_curve, fit_log_power_law, fit_power_law, top_and_median
from jaxinterp.methods.language_model import LanguageModel
from jaxinterp.methods.sparse_language_model import SparseLanguageModel
from jaxinterp.models.files.subject import Subject, save_subject
from jaxinterp.models.load import load
from jaxinterp.models.rules import Activation
from jaxinterp.models.run import run
from jaxinterp.training.fit import fit

POINTS = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
"""Where the models are measured, in parts of the training."""
LOG_EVERY = 10


@dataclass(frozen=True)
class Config:
    """Sizes."""

    out: Path
    """Folder for results; must be empty or absent unless --resume."""
    text: str = "docs"
    """What is learned."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the start values and the order of the text."""
    layers: int = 3
    d_model: int = 64
    d_mlp: int = 256
    heads: int = 4
    vocabulary: int = 1024
    seq: int = 128
    """Tokens a window."""
    batch_size: int = 2048
    """Tokens a step."""
    tokens: int = 1_536_000
    """Training tokens of a model."""
    learning_rate: float = 6e-3
    tuning: float = 0.2
    """Steps of a ProSparse run, in parts of a training."""
    weights: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Last weights of the L1 penalty."""
    points: tuple[float, ...] = POINTS
    """Where the models are measured, in parts of the training, rising to 1."""
    heldout: int = 16_384
    """Held-out tokens for the loss."""
    calibration: int = 4_096
    """Training tokens for thresholds."""
    percent: float = 1.0
    """For CETT-PPL-p %."""
    resume: bool = False
    """Continue the run in the output folder."""


def main(config: Config) -> None:
    """Train and measure, then fine-tune, then fit."""
    check_positive(config, "layers", "d_model", "d_mlp", "heads", "batch_size")
    steps = config.tokens // config.batch_size
    if min(config.points) * steps < LOG_EVERY:
        raise UserError(f"tokens={config.tokens} makes {steps} steps: the first of points={config.points} needs more.")
    if len(config.points) < 5 or list(config.points) != sorted({*config.points, 1.0}):
        raise UserError(f"points={config.points} must be at least 5 numbers that rise to 1.")
    record = settings_of(config)
    check_folder(config.out, record, resume=config.resume)
    with folder_of_a_run(config.out, record) as out:
        text = text_of(config.text, config.vocabulary, out)
        say(f"{config.text}: {text.train.tokens:,} tokens, {text.heldout.tokens:,} held out")
        found = out / "results.json"
        results: dict[str, Any] = read_json(found) if found.exists() else {"rows": [], "tuned": []}
        measure = Measure(config, text)
        for seed in config.seeds:
            for kind in ("silu", "relu"):
                over_training(config, text, measure, kind, seed, steps, out, results)
        prosparse(config, text, measure, round(config.tuning * steps), out, results)
        results["summary"] = summary(config, results)
        write_json(found, results)
        say(*lines_of(results["summary"]))


class Measure:
    """The numbers of one model."""

    def __init__(self, config: Config, text: Text):
        self.config = config
        held, train = windows(text.heldout, config.seq), windows(text.train, config.seq)
        self.batches = [on_device(batch) for batch in take(held, config.heldout, seed=0, rows=16)]
        self.calibration = take(train, config.calibration, seed=1, rows=16)

    def loss(self, model: Any, edits: Mapping[str, Any]) -> float:
        """Cross-entropy on the held-out sample."""
        sums = [_summed(model, edits, batch) for batch in self.batches]
        return sum(float(total) for total, _ in sums) / sum(float(count) for _, count in sums)

    def __call__(self, model: Any) -> dict[str, Any]:
        """See the module's docstring."""
        hidden = hidden_activations(model, self.calibration)
        ce = self.loss(model, {})
        found = cett_ppl(
            model, cett_curves(model, hidden), lambda edits: self.loss(model, edits), ce, self.config.percent
        )
        held = hidden_activations(model, self.batches[:1])
        streams = _streams(model, self.batches[0]["tokens"])
        tops = {name: top_and_median(np.asarray(x)) for name, x in streams.items()}
        return {
            "ce": ce,
            "ratio": found.ratio,
            "cett": found.cett,
            "percent": found.percent,
            "ratio by layer": [round(each.ratio, 4) for each in found.layers.values()],
            "zeros": float(np.mean([np.mean(a == 0) for a in held.values()])),
            "top": [top.top[0] for top in tops.values()],
            "median": [top.median for top in tops.values()],
        }


@eqx.filter_jit
def _summed(model: Any, edits: Any, batch: Any) -> Any:
    log_p = jax.nn.log_softmax(run(model, batch["tokens"], edits=edits, keep=()).logits[:, :-1])
    nll = -jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    counts = counted(batch)
    return jnp.sum(nll * counts), jnp.sum(counts)


@eqx.filter_jit
def _streams(model: Any, tokens: Any) -> dict[str, Any]:
    return run(model, tokens, keep="blocks/*/resid/post").arrays


def over_training(
    config: Config,
    text: Text,
    measure: Measure,
    kind: Activation,
    seed: int,
    steps: int,
    out: Path,
    results: dict[str, Any],
) -> None:
    """One model: trained in parts, measured between them."""
    subject = Subject(start_model(transformer_of(config, kind, gated=True), seed), text.tokenizer, f"{kind}-{seed}")
    done = {row["step"] for row in results["rows"] if (row["kind"], row["seed"]) == (kind, seed)}
    folder = out / subject.name
    for part in config.points:
        stop = max(1, round(part * steps / LOG_EVERY)) * LOG_EVERY if part < 1 else steps
        if stop in done:
            continue
        trained = fit(
            LanguageModel(learning_rate=config.learning_rate),
            subject,
            windows(text.train, config.seq),
            steps=steps,
            batch_size=config.batch_size,
            buffer_batches=1,
            seed=seed,
            checkpoint=folder / "checkpoints",
            resume=(folder / "checkpoints").exists(),
            stop_after=stop if stop < steps else None,
            log_every=LOG_EVERY,
            progress=False,
        )
        row = {"kind": kind, "seed": seed, "step": stop, "tokens": stop * config.batch_size}
        row |= measure(trained.decomposition)
        say(
            f"{subject.name} {row['tokens']:9,} tokens  ce {row['ce']:.4f}  stays {row['ratio']:.3f}  zeros "
            f"{row['zeros']:.3f}  top/median {max(np.divide(row['top'], row['median'])):.1f}"
        )
        if stop == steps:
            save_subject(Subject(trained.decomposition, text.tokenizer, subject.name), folder / "model")
        results["rows"].append(row)
        write_json(out / "results.json", results)


def stages_of(weight: float, steps: int) -> tuple[tuple[float, int], ...]:
    """ProSparse's proportions: weight/40 until .3 of the steps, to weight/4 at .5 and until .6, to weight at .9."""
    at = lambda part: round(part * steps)
    return (weight / 40, at(0.3)), (weight / 4, at(0.5)), (weight / 4, at(0.6)), (weight, at(0.9)), (weight, steps)


def prosparse(config: Config, text: Text, measure: Measure, steps: int, out: Path, results: dict[str, Any]) -> None:
    """The first SiLU model as a ReLU model, with a penalty that is staged or constant."""
    begin = load(out / f"silu-{config.seeds[0]}" / "model", dtype=jnp.float32)
    for weight in (0.0, *config.weights):
        for plan in ("staged", "constant") if weight else ("no penalty",):
            if any((row["plan"], row["weight"]) == (plan, weight) for row in results["tuned"]):
                continue
            stages = stages_of(weight, steps) if plan == "staged" else ()
            method = SparseLanguageModel(
                weight=weight,
                start=round(0.2 * steps) if plan == "staged" else 0,
                stages=stages,
                activation="relu",
                learning_rate=config.learning_rate / 4,
            )
            trained = fit(
                method,
                begin,
                windows(text.train, config.seq),
                steps=steps,
                batch_size=config.batch_size,
                buffer_batches=1,
                seed=100,
                log_every=LOG_EVERY,
                progress=False,
            )
            hidden = hidden_activations(trained.decomposition, measure.batches)
            density = float(np.mean([np.mean(a != 0) for a in hidden.values()]))
            row = {"plan": plan, "weight": weight, "density": density, "ce": measure.loss(trained.decomposition, {})}
            say(f"{plan:10s} {weight:g}  density {density:.4f}  ce {row['ce']:.4f}")
            results["tuned"].append(row)
            write_json(out / "results.json", results)


def summary(config: Config, results: Mapping[str, Any]) -> dict[str, Any]:
    """Final rows, ratios at equal loss, laws, curves, and the two schedules at equal density."""
    found: dict[str, Any] = {"runs": [], "equal loss": [], "tuned": results["tuned"]}
    for seed in config.seeds:
        runs = {
            kind: [row for row in results["rows"] if (row["kind"], row["seed"]) == (kind, seed)]
            for kind in ("silu", "relu")
        }
        for kind, rows in runs.items():
            found["runs"].append(run_summary(kind, seed, rows))
        at = max(rows[-1]["ce"] for rows in runs.values())
        ratios = {kind: at_loss(rows, at) for kind, rows in runs.items()}
        found["equal loss"].append({"seed": seed, "ce": at} | ratios)
    found["equal density"] = equal_density(results["tuned"])
    return found


def run_summary(kind: str, seed: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last row of a model, its law, and the five-parameter curve of its largest entry."""
    tokens, ratio = (np.asarray([row[name] for row in rows], np.float64) for name in ("tokens", "ratio"))
    law, fit_of_law = (fit_power_law if kind == "silu" else fit_log_power_law)(tokens, ratio)
    sizes = np.asarray([np.divide(row["top"], row["median"]) for row in rows])
    layer = int(sizes[-1].argmax())
    curve, fit_of_curve = fit_curve(np.asarray([row["step"] for row in rows], np.float64), sizes[:, layer])
    not_zero = np.asarray([1 - row["zeros"] for row in rows])
    extra = {}
    if kind == "relu":  # what is exactly 0, besides
        density_law, fit_of_density = fit_log_power_law(tokens, not_zero)
        extra = {"density": not_zero.tolist(), "density law": density_law._asdict(), "density law R2": fit_of_density}
    last = {name: rows[-1][name] for name in ("ce", "ratio", "cett", "zeros", "ratio by layer")}
    return {
        "kind": kind,
        "seed": seed,
        **last,
        **extra,
        "ratios": ratio.tolist(),
        "law": law._asdict(),
        "law R2": fit_of_law,
        "block of the largest": layer,
        "top/median": sizes[:, layer].tolist(),
        "curve": curve._asdict(),
        "curve R2": fit_of_curve,
    }


def at_loss(rows: Sequence[Mapping[str, Any]], ce: float) -> float:
    """The ratio where a model's loss passes `ce`, linear between two measured points."""
    falling = sorted(rows, key=lambda row: row["ce"])
    return float(np.interp(ce, [row["ce"] for row in falling], [row["ratio"] for row in falling]))


def equal_density(tuned: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """At every density that one of the plans reached within the range of the other: the two losses.

    The other plan's loss is linear in log density between its measured points.
    """
    plans = {
        plan: sorted((row for row in tuned if row["plan"] == plan), key=lambda row: row["density"])
        for plan in ("constant", "staged")
    }
    found = []
    for plan, other in (("constant", "staged"), ("staged", "constant")):
        x, y = np.log([row["density"] for row in plans[other]]), [row["ce"] for row in plans[other]]
        for row in plans[plan]:
            at = np.log(row["density"])
            if len(x) > 1 and x[0] <= at <= x[-1]:
                found.append({"density": row["density"], plan: row["ce"], other: float(np.interp(at, x, y))})
    return found


def of_zeros(row: Mapping[str, Any]) -> str:
    """The law of the share that is not exactly 0, where there is one."""
    return f", of not-zero {row['density law R2']:.3f}" if "density law R2" in row else ""


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """The summary in words."""
    lines = [
        f"{row['kind']}-{row['seed']}: ce {row['ce']:.4f}, stays {row['ratios'][1]:.3f} -> {row['ratio']:.3f}, zeros "
        f"{row['zeros']:.3f}; law R2 {row['law R2']:.3f}{of_zeros(row)}; "
        f"top/median {row['top/median'][-1]:.1f}, curve R2 "
        f"{row['curve R2']:.3f}"
        for row in found["runs"]
    ]
    lines += [f"seed {row['seed']} at ce {row['ce']:.4f}: silu {row['silu']:.3f}, relu {row['relu']:.3f}"
              for row in found["equal loss"]]  # fmt: skip
    lines += [f"density {row['density']:.4f}: constant {row['constant']:.4f}, staged {row['staged']:.4f}"
              for row in found["equal density"]]  # fmt: skip
    return lines


if __name__ == "__main__":
    command(Config, main, __doc__)
