"""What the scores of the sparsity experiment are calibrated with: sums, gradients, hidden activations."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.data.activations import counted, on_device
from jaxinterp.evaluation.sparsity.calibrate import Summary, calibrate
from jaxinterp.models.edits import Add
from jaxinterp.models.leave_out import BySize
from jaxinterp.models.run import run


class Statistics(eqx.Module):
    """What calibration gives, by leaf."""

    hidden: dict[str, Summary]
    up: dict[str, Summary]
    inputs: dict[str, Summary]
    effect: dict[str, np.ndarray]  # E |a dL/da|
    kept: dict[str, Any]  # hidden activations of the tokens with weight, [tokens, d]
    stream: dict[str, float]  # the mean norm of resid/post


def statistics(model: Any, leaves: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> Statistics:
    """Sums over the calibration text, gradients among them, and the hidden activations of its tokens."""
    ports = ("hidden", "up", "in")
    wanted = {f"{leaf}/{port}": (f"{leaf}/{port}", BySize()) for leaf in leaves for port in ports}
    found = calibrate(model, batches, wanted)
    hidden = [f"{leaf}/hidden" for leaf in leaves]
    kept: dict[str, list[Any]] = {leaf: [] for leaf in leaves}
    effect: dict[str, Any] = dict.fromkeys(leaves, 0.0)
    stream: dict[str, Any] = dict.fromkeys(leaves, 0.0)
    tokens = 0.0
    for batch in batches:
        arrays = on_device(batch)
        values, gradients, norms = _gradients(model, arrays, tuple(hidden))
        weight = np.asarray(batch["weight"]) > 0
        tokens += weight.sum()
        for leaf, name in zip(leaves, hidden, strict=True):
            value = np.asarray(values[name])[weight]
            kept[leaf].append(value)
            effect[leaf] = effect[leaf] + np.abs(value * np.asarray(gradients[name])[weight]).sum(0)
            stream[leaf] += float(np.asarray(norms[name])[weight].sum())
    return Statistics(
        {leaf: found[f"{leaf}/hidden"] for leaf in leaves},
        {leaf: found[f"{leaf}/up"] for leaf in leaves},
        {leaf: found[f"{leaf}/in"] for leaf in leaves},
        {leaf: effect[leaf] / tokens for leaf in leaves},
        {leaf: jnp.asarray(np.concatenate(kept[leaf])) for leaf in leaves},
        {leaf: stream[leaf] / tokens for leaf in leaves},
    )


@eqx.filter_jit
def _gradients(model: Any, batch: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Hidden activations, the gradient of the summed loss by them, and the norm of the stream behind the block."""

    def loss(zeros: Any) -> Any:
        edits = {name: Add(zero) for name, zero in zeros.items()}
        trace = run(model, batch["tokens"], edits=edits, keep=("**/mlp/hidden", "**/resid/post"))
        log_p = jax.nn.log_softmax(trace.logits[:, :-1])
        nll = -jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(nll * counted(batch)), trace.arrays

    shape = (*batch["tokens"].shape, model.config.d_mlp)
    zeros = {name: jnp.zeros(shape, jnp.float32) for name in names}
    gradients, arrays = jax.grad(loss, has_aux=True)(zeros)
    norms = {name: jnp.linalg.norm(arrays[name.replace("mlp/hidden", "resid/post")], axis=-1) for name in names}
    return {name: arrays[name] for name in names}, gradients, norms
