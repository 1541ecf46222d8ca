"""Train several methods on the same text, and score them side by side.

compare([Transcoder(features=64, k=4), Mine()], subject, train, heldout, site="blocks/1/mlp", steps=400).rows
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grain
from jax.sharding import Mesh

from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import Method
from jaxinterp.core.sites import as_needs
from jaxinterp.evaluation.effects import Effect, Row
from jaxinterp.evaluation.next_token import NEXT_TOKEN
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.models.load import Subject
from jaxinterp.training.fit import Fit, expand, fit
from jaxinterp.training.mesh import fetch


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes:
      rows: of the scoreboard, in the order of the methods.
      fits: what training each method returned, by name; arrays are whole, on the first device.
    """

    rows: list[Row]
    fits: dict[str, Fit]


def compare(
    methods: Mapping[str, Method] | Sequence[Method],
    subject: Subject,
    train: grain.MapDataset,
    heldout: grain.MapDataset,
    *,
    site: str,
    steps: int | None = None,
    rows: int | None = None,
    batch_size: int = 2048,
    buffer_batches: int = 8,
    seed: int = 0,
    mesh: Mesh | None = None,
    tokens: int = 32_768,
    ce_tokens: int = 8_192,
    effect: Effect = NEXT_TOKEN,
    protocols: str | Sequence[str] = "alone",
    progress: bool = True,
) -> Comparison:
    """Train each method with `fit`, one after another from the same seed, and score all on one scoreboard.

    Args:
      methods: by the name of their row, or a list: each is named after its class then.
      subject, train, site, steps, batch_size, buffer_batches, seed, mesh, progress: as for `fit`.
      rows: as for `fit`, for those methods that keep rows.
      heldout, tokens, ce_tokens, effect, protocols: as for `scoreboard`.
    Returns:
      Rows and fits. Any class with `needs` and `recipe` is a method: yours need no line in the package.
    Raises:
      UserError: two methods of a list have one name; as `fit` and `scoreboard`.
    """
    named = dict(methods) if isinstance(methods, Mapping) else {type(each).__name__: each for each in methods}
    if len(named) < len(methods):
        raise UserError("methods: two of the list are of one class: give a mapping, {name: method, ...}.")
    fits, where = {}, expand(subject.model, site)
    for name, method in named.items():
        made = fit(
            method,
            subject,
            train,
            site=site,
            steps=steps,
            rows=rows if as_needs(method.needs(where)).rows == "kept" else None,
            batch_size=batch_size,
            buffer_batches=buffer_batches,
            seed=seed,
            mesh=mesh,
            progress=progress,
        )
        fits[name] = Fit(fetch(made.decomposition), made.history, made.state)
    board = scoreboard(
        {name: made.decomposition for name, made in fits.items()},
        subject,
        heldout,
        tokens=tokens,
        ce_tokens=ce_tokens,
        effect=effect,
        seed=seed,
        protocols=protocols,
    )
    return Comparison(board, fits)
