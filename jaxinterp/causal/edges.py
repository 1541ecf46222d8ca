"""Edge attribution (EAP): how much each part of the residual stream matters to each sublayer that reads it.

    score(u, v) = sum over positions (u_fill - u) . dM/d(residual as v reads it)

Sources u: `embed`, every head (`blocks/i/attn/head/h`: z_h W_O,h) and every MLP (`blocks/i/mlp`). Targets v:
`blocks/i/attn` and `blocks/i/mlp`, each in front of its norm, and `final`. Scores of sources that come after a target
are 0. Heads are not told apart as targets, nor query, key and value.

With EXACT rules at one point this is EAP; averaged while `embed` moves to its fill, EAP-IG; RELEVANCE: its RelP form.
Sign: fill - run, as everywhere here; the published code of EAP-IG has the opposite.

Sources: Syed et al. 2023, arXiv 2310.10348 (EAP); Hanna et al. 2024, arXiv 2403.17806 (EAP-IG).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.causal.attribute import coefficients
from jaxinterp.causal.measure import Metric
from jaxinterp.core.errors import UserError
from jaxinterp.models.attention import Attention
from jaxinterp.models.edits import Add
from jaxinterp.models.layers import normed
from jaxinterp.models.rules import EXACT, Rules
from jaxinterp.models.run import run
from jaxinterp.models.transformer import Transformer


class Edges(eqx.Module):
    """Scores [batch, sources, targets], and what the rows and columns are."""

    scores: Float[Array, "batch sources targets"]
    sources: tuple[str, ...] = eqx.field(static=True)
    targets: tuple[str, ...] = eqx.field(static=True)


def edge_scores(
    model: PyTree,
    tokens: Int[Array, "batch seq"],
    fill_tokens: Int[Array, "fill_batch fill_seq"],
    metric: Metric,
    *,
    rules: Rules = EXACT,
    steps: int = 1,
) -> Edges:
    """The score of every edge for putting the run on `fill_tokens` into the run on `tokens`.

    Args:
      tokens: the run that is patched; fill_tokens: what is put in, aligned position by position.
      steps: 1: the derivative at the run (EAP); more: its mean at alpha = k / steps, k = 0 .. steps - 1 (EAP-IG, left).
    Raises:
      UserError: the model is not a Transformer whose sublayers write straight into the residual stream.
    """
    if not isinstance(model, Transformer) or model.config.post_norms or model.config.sum_norms:
        raise UserError("edges need a Transformer without norms behind its sublayers: take attribute(...) instead.")
    if any(not isinstance(block.attn, Attention) for block in model.blocks):
        raise UserError("edges need the original attention sublayers: one was replaced.")
    if model.per_layer is not None or any(block.scale is not None for block in model.blocks):
        raise UserError("edges need a plain residual stream, without factors or vectors by layer: take attribute(...).")
    if steps < 1:
        raise UserError(f"steps={steps} must be positive.")
    if jnp.shape(tokens) != jnp.shape(fill_tokens):
        raise UserError(
            f"tokens {jnp.shape(tokens)} and fill_tokens {jnp.shape(fill_tokens)} are matched position by position: "
            "give both one shape."
        )
    layers, heads = len(model.blocks), model.config.heads
    sources, targets = ["embed"], []
    for index in range(layers):
        sources += [f"blocks/{index}/attn/head/{head}" for head in range(heads)] + [f"blocks/{index}/mlp"]
        targets += [f"blocks/{index}/attn", f"blocks/{index}/mlp"]
    scores = _scores(model, tokens, fill_tokens, metric, rules, steps)
    return Edges(scores, tuple(sources), (*targets, "final"))


@eqx.filter_jit
def _scores(model: Transformer, tokens: Array, fill_tokens: Array, metric: Metric, rules: Rules, steps: int) -> Array:
    here, there = run(model, tokens), run(model, fill_tokens)
    changes = [there["embed"] - here["embed"]]
    for index, block in enumerate(model.blocks):
        z = there[f"blocks/{index}/attn/z"] - here[f"blocks/{index}/attn/z"]
        weight = block.residual_scale * block.attn.o_proj.weight.reshape(*z.shape[2:], -1)
        changes += [z[:, :, head] @ weight[head] for head in range(z.shape[2])]
        changes.append(there[f"blocks/{index}/mlp/added"] - here[f"blocks/{index}/mlp/added"])
    total = jnp.zeros(())
    for step in range(steps):
        moved = {"embed": Add(step / steps * changes[0])}
        total = total + _at(model, tokens, metric, rules, moved, changes)
    return total / steps


def _at(model: Transformer, tokens: Array, metric: Metric, rules: Rules, edits: Any, changes: list[Array]) -> Array:
    """Scores with the derivative at one point."""
    layers, heads = len(model.blocks), model.config.heads
    trace = run(model, tokens, edits=edits)
    reads = [f"blocks/{index}/{part}/in" for index in range(layers) for part in ("attn", "mlp")]
    slopes = coefficients(model, tokens, metric, (*reads, "final"), rules=rules, edits=edits)
    columns = []
    for number, name in enumerate((*reads, "final")):
        index, mlp = divmod(number, 2)
        if name == "final":
            norm, stream, known = model.final_norm, trace[f"blocks/{layers - 1}/resid/post"], len(changes)
        else:
            block = model.blocks[index]
            norm = block.mlp_norm if mlp else block.attn_norm
            middle = mlp and not model.config.parallel
            stream = trace[f"blocks/{index}/resid/{'mid' if middle else 'pre'}"]
            known = 1 + index * (heads + 1) + (heads if middle else 0)
        _, pull = jax.vjp(lambda x, norm=norm: normed(norm, x, rules), stream)
        (slope,) = pull(slopes[name])
        column = [jnp.sum(change * slope, axis=(1, 2)) for change in changes[:known]]
        column += [jnp.zeros(tokens.shape[0], slope.dtype)] * (len(changes) - known)
        columns.append(jnp.stack(column, axis=1))
    return jnp.stack(columns, axis=2)
