"""How well a language model predicts a text.

    ce = mean over next tokens of  -log p(next token | those before it in the window),   in nats

over the next tokens that the scoreboard counts (`counted`): those of the same document as the token before them,
neither of the two at position 0 or special. It is the scoreboard's `ce_clean`, over a whole text instead of a sample.
"""

from typing import Any

import equinox as eqx
import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.data.activations import counted
from jaxinterp.methods.language_model import next_token_nll
from jaxinterp.models.ids import check_ids


@ordinary()
def language_loss(model: PyTree, text: grain.MapDataset, *, rows: int = 8) -> dict[str, float]:
    """`ce`, in nats per token, and `tokens`, over how many next tokens, of all windows of a text.

    Args:
      text: windows {"tokens", "weight", "document"}, each `[seq]`.
      rows: windows that are run together.
    Raises:
      UserError: no next token counts.
    """
    total, tokens = 0.0, 0.0
    for start in range(0, len(text), rows):
        windows: list[Any] = [text[index] for index in range(start, min(start + rows, len(text)))]
        batch = {name: np.stack([window[name] for window in windows]) for name in windows[0]}
        missing = rows - len(windows)  # rows without weight: every batch has the same shape, and one program serves all
        batch = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in batch.items()}
        check_ids(model, batch["tokens"], "text")
        nll, count = _summed(model, batch)
        total, tokens = total + float(nll), tokens + float(count)
    if not tokens:
        raise UserError("no next token of the text counts: give longer documents.")
    return {"ce": total / tokens, "tokens": tokens}


@eqx.filter_jit
def _summed(model: PyTree, batch: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
    counts = counted(batch)
    return jnp.sum(next_token_nll(model, batch["tokens"]) * counts), jnp.sum(counts)
