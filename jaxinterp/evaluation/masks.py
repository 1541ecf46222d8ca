"""What a language model loses under masks of its parameter components: cross-entropy and KL, by kind of mask.

    all          every part, without what is in no part (D)
    stochastic   m = g + (1 - g) r and m_D = r, r ~ U(0, 1)
    importance   m = g
    rounded      m = 1 where g > 0
    adversarial  m = g + (1 - g) s and m_D = s; s shared by all inputs, `ascents` steps of `rate` times the sign of the
                 gradient of KL, from random values
    none         no part

g: causal importances for each input. All but "stochastic" and "adversarial" leave D out.

Sources: Bushnaq, Braun, Sharkey 2025 (arXiv 2506.20790); the evaluation's adversary is that of Goodfire 2026 (VPD).
"""

from collections.abc import Mapping
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.json_value import Json
from jaxinterp.data.activations import counted
from jaxinterp.decompositions.parameter_parts import ParameterParts
from jaxinterp.methods.factor import parameters as spd
from jaxinterp.methods.factor import vpd
from jaxinterp.methods.factor.targets import Clean, ProjectionTarget

MaskName = Literal["all", "stochastic", "importance", "rounded", "adversarial", "none"]

MASKS: tuple[MaskName, ...] = get_args(MaskName)


def mask_table(
    target: ProjectionTarget,
    learned: ParameterParts,
    model: PyTree,
    batch: Batch,
    key: PRNGKeyArray,
    *,
    names: tuple[MaskName, ...] = MASKS,
    ascents: int = 20,
    rate: float = 0.1,
) -> list[dict[str, Json]]:
    """A row for every kind of mask: `mask`, `ce` and `kl` in nats a token, `l0` open parts a token in all matrices.

    Args:
      batch: with windows of text. The first row is "clean": the model as it is.
    """
    clean = target.clean(model, batch)
    importances = learned.importances(clean.reads)
    source_key, adversary_key = jax.random.split(key)
    assert batch.windows is not None  # `clean` has read them
    text = batch.windows

    # Models and batches are arguments: as constants they would be folded into the program, logits and all.
    @eqx.filter_jit
    def answer(model: PyTree, parts: PyTree, batch: Batch, masks: Mapping[str, spd.Mask]) -> Array:
        return target.masked(model, parts, batch, masks)

    @eqx.filter_jit
    def climb(
        model: PyTree, parts: PyTree, batch: Batch, clean: Clean, given: Mapping[str, spd.Importances], start: PyTree
    ) -> PyTree:
        def loss(sources: dict[str, Array]) -> Array:
            masked = lambda masks: target.masked(model, parts, batch, masks)
            return vpd.adversarial(masked, clean.output, given, sources, target.kind, clean.weight)

        return vpd.projected_ascent(loss, start, steps=ascents, rate=rate)

    def adversary() -> dict[str, spd.Mask]:
        start = vpd.start_adversary(adversary_key, {name: len(one.read) for name, one in learned.parts.items()})
        found = climb(model, learned.parts, batch, clean, importances, start.sources)
        return vpd.adversarial_masks(importances, found)

    makers = {
        "all": lambda: {n: spd.Mask(jnp.ones_like(g.lower)) for n, g in importances.items()},
        "stochastic": lambda: spd.masks_from(importances, spd.uniform_sources(source_key, importances)),
        "importance": lambda: {n: spd.Mask(g.lower) for n, g in importances.items()},
        "rounded": lambda: {n: spd.Mask((g.lower > 0).astype(g.lower.dtype)) for n, g in importances.items()},
        "adversarial": adversary,
        "none": lambda: {n: spd.Mask(jnp.zeros_like(g.lower)) for n, g in importances.items()},
    }
    rows: list[dict[str, Json]] = [{"mask": "clean", "ce": _cross_entropy(clean.output, text), "kl": 0.0, "l0": None}]
    for name in names:
        masks = makers[name]()
        logits = answer(model, learned.parts, batch, masks)
        opened = sum(float(jnp.mean(jnp.sum(mask.parts > 0, axis=-1))) for mask in masks.values())
        kl = float(spd.distance(clean.output, logits, "kl", clean.weight))
        rows.append({"mask": name, "ce": _cross_entropy(logits, text), "kl": kl, "l0": opened})
    return rows


def _cross_entropy(logits: Float[Array, "batch seq vocab"], windows: Mapping[str, Array]) -> float:
    log_p = jax.nn.log_softmax(logits[:, :-1])
    nll = -jnp.take_along_axis(log_p, windows["tokens"][:, 1:, None], axis=-1)[..., 0]
    counts = counted(windows)
    return float(jnp.sum(nll * counts) / jnp.maximum(jnp.sum(counts), 1))
