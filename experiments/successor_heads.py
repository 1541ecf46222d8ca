"""Heads that turn an ordinal into its successor, found from weights alone.

    python -m experiments.successor_heads --model smollm2-135m

For the tokens t of an ordered class (days, months, numbers in words, letters): the effective embedding

    x_t = E_t + MLP_0(norm(E_t))

goes through one head's value and output maps and the unembedding; the head is right on t where, within the class, the
largest logit is that of the token after t. Score: the share that is right, mean over classes. Control: the best score
of any head where the order of each class is shuffled, so that the successor is an arbitrary other token; that is what
searching through all heads finds by luck.

Claim: Gould et al. 2023, arXiv 2312.09230: such heads exist in models from 31 million parameters on.
Verdict by: the best head's score is above the largest of the shuffled controls.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinterp.causal.task_words import DAYS, MONTHS, NUMBERS
from jaxinterp.core.errors import UserError
from jaxinterp.models.layers import normed
from jaxinterp.models.load import load
from jaxinterp.models.transformer import Transformer

CLASSES = {"days": DAYS, "months": MONTHS, "numbers": NUMBERS, "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")}


def class_logits(model: Transformer, ids: Array) -> np.ndarray:
    """Logits of the class's own tokens behind every head alone, [heads of all layers, tokens, tokens]."""
    embedded = model.embedding.token[ids] * model.embedding.scale
    first = model.blocks[0]
    x = embedded + first.mlp(normed(first.mlp_norm, embedded))
    found = []
    for block in model.blocks:
        attention, d = block.attn, x.shape[-1]
        value = attention.v_proj.weight.reshape(d, attention.kv_heads, -1)
        value = jnp.repeat(value, attention.heads // attention.kv_heads, axis=1)
        out = attention.o_proj.weight.reshape(attention.heads, -1, d)
        written = jnp.einsum("td,dhk,hke->hte", normed(block.attn_norm, x), value, out)
        found.append(model.unembed(normed(model.final_norm, written))[..., ids])
    return np.concatenate([np.asarray(each) for each in found])


def share_right(logits: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How often each head's largest logit is that of the next token in this order; the last token has none."""
    best = np.argmax(logits[:, order][:, :, order], axis=-1)[:, :-1]
    return (best == np.arange(1, len(order))).mean(axis=1)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; prints and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shuffles", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("results/successor_heads.json"))
    given = parser.parse_args(arguments)
    subject = load(given.model)
    model = subject.model
    if not isinstance(model, Transformer) or subject.tokenizer is None:
        raise UserError(f"model={given.model!r} must be a Transformer with a tokenizer.")
    logits = {}
    for name, words in CLASSES.items():
        encoded = [subject.tokenizer.encode(f" {word}") for word in words]
        ids = [row[0] for row in encoded if len(row) == 1]
        if len(ids) >= 5:
            logits[name] = class_logits(model, jnp.asarray(ids))
            print(f"{name}: {len(ids)} of {len(words)} words are one token", flush=True)
    own = {name: share_right(each, np.arange(each.shape[1])) for name, each in logits.items()}
    score = np.mean(list(own.values()), axis=0)
    draw = np.random.default_rng(0)
    control = [
        float(np.mean([share_right(each, draw.permutation(each.shape[1])) for each in logits.values()], axis=0).max())
        for _ in range(given.shuffles)
    ]
    heads = model.config.heads
    best = [
        {"layer": int(place // heads), "head": int(place % heads), "score": float(score[place])}
        | {name: float(each[place]) for name, each in own.items()}
        for place in np.argsort(-score)[:5]
    ]
    result = {"model": given.model, "best": best, "control_mean": float(np.mean(control)), "control_max": max(control)}
    for row in best:
        classes = ", ".join(f"{name} {row[name]:.2f}" for name in own)
        print(f"layer {row['layer']} head {row['head']}: {row['score']:.2f} ({classes})")
    print(f"shuffled orders, best head: mean {np.mean(control):.2f}, largest of {given.shuffles} {max(control):.2f}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
