"""Factual recall by regression: what the MLPs of late layers make of each head's output, on 40 countries.

    python -m experiments.factor_recall --out runs/recall

"The capital of X is", last position. Per layer, the MLP's output is regressed on the outputs of the layer's heads and
the stream that comes in (scalar coefficients and a task vector; arXiv 2403.19521), on 30 prompts, and tested on the
other 10, over several splits. R^2 is against the mean of the MLP's output over the training prompts: the baseline
scores 0. Beside it the share of |m|^2, which the mean alone explains in large part. The regressors are divided by the
length of what the norm reads, as the MLP sees them ("scaled"), or not ("raw").

Read out: the rank of each prompt's answer (first token of the capital) by the stream before and after the MLP, and the
mean lens of the task vector over the answers against all tokens.

Anti-overconfidence: what the last layer's heads and MLP add along the answer's read-out direction (unembedding column
less its mean, times the norm's weight) is multiplied by a scale; 0 takes it out. If the last layer suppresses answers,
the answer's log-probability rises. Control: the same for the answer of the next prompt.

Expected: R^2 > .5 on a fixed template, the answer's rank better after some layer >= 20; the last layer suppresses the
answer, and taking that out raises its probability.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinterp.commands.shell import check_folder, command, folder_of_a_run, say, settings_of, write_json
from jaxinterp.methods.factor import regression
from jaxinterp.models.load import load
from jaxinterp.models.run import run

CAPITALS = """France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Japan:Tokyo China:Beijing
Russia:Moscow Egypt:Cairo Greece:Athens Austria:Vienna Poland:Warsaw Hungary:Budapest Ireland:Dublin
Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Belgium:Brussels Turkey:Ankara
Iran:Tehran Iraq:Baghdad Syria:Damascus Lebanon:Beirut Kenya:Nairobi Cuba:Havana Peru:Lima Chile:Santiago
Canada:Ottawa Australia:Canberra Thailand:Bangkok Vietnam:Hanoi Ukraine:Kyiv Romania:Bucharest
Bulgaria:Sofia Serbia:Belgrade Croatia:Zagreb Nepal:Kathmandu Ethiopia:Addis Pakistan:Islamabad"""


@dataclass(frozen=True)
class Config:
    """One model."""

    out: Path
    """Folder for the results; must be empty or absent."""
    model: str = "smollm2-135m"
    """A transformer of the package."""
    first: int = 15
    """The first layer."""
    splits: int = 5
    """Random splits into training and test prompts."""
    seed: int = 0
    """Of the splits."""


@eqx.filter_jit
def at_the_end(model: Any, tokens: Any, place: Any) -> dict[str, Array]:
    """Arrays of every layer at one position of one prompt."""
    trace = run(model, tokens)
    ports = ("attn/z", "resid/pre", "resid/mid", "resid/post", "mlp/out")
    return {name: value[0, place] for name, value in trace.arrays.items() if name.endswith(ports)} | {
        "logits": trace.logits[0, place]
    }


def head_outputs(attention: Any, z: Array) -> Array:
    """What each head writes: z_h times its rows of the output projection, [prompts, heads, d]."""
    weight = attention.o_proj.weight.reshape(z.shape[1], z.shape[2], -1)
    return jnp.einsum("phk,hkd->phd", z, weight)


def without_suppression(
    model: Any, stacked: dict[str, Array], unembedding: Array, answers: np.ndarray, measured: np.ndarray, scale: float
) -> dict[str, dict[str, float]]:
    """Mean log-probability of `measured` with the last layer's part along the directions of `answers` scaled, for heads
    and MLP, and what that layer adds along them."""
    last = f"blocks/{len(model.blocks) - 1}"
    post, mid = stacked[f"{last}/resid/post"], stacked[f"{last}/resid/mid"]
    added = {"heads": mid - stacked[f"{last}/resid/pre"], "MLP": stacked[f"{last}/mlp/out"]}
    columns = unembedding[:, answers] - jnp.mean(unembedding, axis=1, keepdims=True)
    directions = columns.T * model.final_norm.weight
    found = {}
    for name, own in added.items():
        changed = jax.vmap(lambda one, u: regression.less_suppression(one, u, scale))(own, directions)
        log_p = jax.nn.log_softmax(model.final_norm(post + changed - own) @ unembedding)
        lengths = jnp.linalg.norm(directions, axis=1)
        found[name] = {
            "log_p": float(jnp.mean(log_p[jnp.arange(len(measured)), measured])),
            "along": float(jnp.mean(jnp.sum(own * directions, axis=1) / lengths)),
            "suppressed": float(jnp.mean(jnp.sum(own * directions, axis=1) < 0)),
        }
    return found


def main(config: Config) -> None:
    """Regress, test, write `results.json`."""
    check_folder(config.out, settings_of(config), resume=False)
    subject = load(config.model)
    model: Any = subject.model
    tokenizer = subject.tokenizer
    assert tokenizer is not None
    pairs = [pair.split(":") for pair in CAPITALS.split()]
    prompts = [tokenizer.encode(f"The capital of {country} is") for country, _ in pairs]
    answers = np.array([tokenizer.encode(f" {capital}")[0] for _, capital in pairs])
    longest = max(len(prompt) for prompt in prompts)
    found = []
    for prompt in prompts:
        padded = np.zeros((1, longest), np.int32)
        padded[0, : len(prompt)] = prompt
        found.append(at_the_end(model, jnp.asarray(padded), len(prompt) - 1))
    stacked = {name: jnp.stack([one[name] for one in found]) for name in found[0]}
    unembedding = model.embedding.token.T if model.unembedding is None else model.unembedding.weight
    lens = jax.jit(lambda rows: model.final_norm(rows) @ unembedding)

    def rank(rows: Array) -> np.ndarray:
        logits = np.asarray(lens(rows))
        return (logits > logits[np.arange(len(answers)), answers][:, None]).sum(axis=1) + 1

    rng = np.random.default_rng(config.seed)
    orders = [rng.permutation(len(prompts)) for _ in range(config.splits)]
    layers = []
    for layer in range(config.first, len(model.blocks)):
        at = lambda port, layer=layer: stacked[f"blocks/{layer}/{port}"]
        heads = head_outputs(model.blocks[layer].attn, at("attn/z"))
        regressors = jnp.concatenate([heads, at("resid/pre")[:, None]], axis=1)
        size = jnp.sqrt(jnp.mean(at("resid/mid") ** 2, axis=-1))[:, None, None]
        row: dict[str, Any] = {"layer": layer}
        for kind, a in (("raw", regressors), ("scaled", regressors / size)):
            scores, shares, means, tasks, conditions = [], [], [], [], []
            for order in orders:
                train, test = order[:30], order[30:]
                fitted = regression.fit_regression(a[train], at("mlp/out")[train])
                m, guess = np.asarray(at("mlp/out"), np.float64), regression.predict(fitted, a[test])
                scores.append(regression.r_squared(guess, m[test], m[train].mean(axis=0)))
                shares.append(regression.r_squared(guess, m[test], np.zeros(m.shape[1])))
                means.append(regression.r_squared(m[train].mean(axis=0)[None] + 0 * guess, m[test], 0 * m[0]))
                tasks.append(fitted.task)
                conditions.append(fitted.condition)
            row[kind] = {
                "r2": float(np.mean(scores)),
                "r2_range": [min(scores), max(scores)],
                "r2_train": fitted.r_squared,
                "share_of_square": float(np.mean(shares)),
                "share_of_square_by_mean": float(np.mean(means)),
                "condition": max(conditions),
                "beta": fitted.beta.tolist(),
            }
            scale = np.asarray(model.final_norm.weight, np.float64)
            logits = regression.lens(np.mean(tasks, axis=0) * scale, np.asarray(unembedding))
            row[kind]["task_lens"] = float(logits[answers].mean() / logits.std())
        before, after = rank(at("resid/mid")), rank(at("resid/post"))
        row |= {"rank_before": float(np.median(before)), "rank_after": float(np.median(after)),
                "better": float(np.mean(after < before))}  # fmt: skip
        layers.append(row)
        parts = ("r2", "share_of_square", "share_of_square_by_mean")
        r2 = "; ".join(f"{kind} " + ", ".join(f"{row[kind][part]:.3f}" for part in parts) for kind in ("raw", "scaled"))
        say(f"layer {layer}: R2 {r2}; rank {row['rank_before']} -> {row['rank_after']}")
    right = float(np.mean(np.argmax(np.asarray(stacked["logits"]), axis=1) == answers))
    say(f"answers that the model gives: {right:.2f}")
    other = np.roll(answers, -1)
    overconfidence = {
        f"{which}, scale {scale:g}": without_suppression(model, stacked, unembedding, tokens, answers, scale)
        for which, tokens in (("answer", answers), ("control", other))
        for scale in (1.0, 0.5, 0.0)
    }
    say(*(f"{name}: {row}" for name, row in overconfidence.items()))
    with folder_of_a_run(config.out, settings_of(config)) as out:
        write_json(out / "results.json", {"accuracy": right, "layers": layers, "overconfidence": overconfidence})


if __name__ == "__main__":
    command(Config, main, __doc__)
