"""The scoreboard of a decomposition of several layers: all of them replaced together, and each alone.

Every number is that of `jaxinterp.evaluation.scoreboard`, with the protocols `propagated` and `alone`.
"""

from collections.abc import Mapping

import grain
from jaxtyping import Array

from jaxinterp.core.decomposition import Decomposition
from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.effects import Effect, Row, check_effect
from jaxinterp.evaluation.next_token import NEXT_TOKEN
from jaxinterp.evaluation.scoreboard import check_counts, scoreboard
from jaxinterp.models.load import Subject


def score_layers(
    decomposition: Decomposition,
    subject: Subject,
    heldout: grain.MapDataset,
    *,
    tokens: int = 32_768,
    ce_tokens: int = 8_192,
    means: Mapping[str, Array] | None = None,
    effect: Effect = NEXT_TOKEN,
    seed: int = 0,
    progress: bool = False,
) -> list[Row]:
    """Score a decomposition of several layers.

    Args:
      decomposition: a `CrossLayer`, a `PerLayer`, or another that encodes and decodes by layer.
      heldout, tokens, ce_tokens, means, effect, seed, progress: as for `scoreboard`.
    Returns:
      A row for all layers together, errors travelling on (`method` "all"), then one for each layer alone (`method`: the
      array it writes).
    Raises:
      UserError: the decomposition is one of a single layer, the model has no logits, or `tokens` or `ce_tokens` is
        below 1.
    """
    check_counts(tokens=tokens, ce_tokens=ce_tokens)
    check_effect(subject.model, effect)
    if isinstance(decomposition.sites.writes, str):
        raise UserError(f"{decomposition.sites.writes!r} is one layer: score it with jaxinterp.score.")
    rows = scoreboard(
        {"all": decomposition},
        subject,
        heldout,
        tokens=tokens,
        ce_tokens=ce_tokens,
        means=means,
        effect=effect,
        seed=seed,
        protocols=("propagated", "alone"),
        progress=progress,
    )
    return [rows[0], *(row | {"method": row["writes"]} for row in rows[1:])]
