"""The list of effects: the one place that pages and command lines read. Yours needs no line here: pass it by value."""

from collections.abc import Mapping, Sequence

from jaxinterp.evaluation.effects import Effect
from jaxinterp.evaluation.next_token import NEXT_TOKEN
from jaxinterp.evaluation.pooled import POOLED

EFFECTS: Mapping[str, Effect] = {"next_token": NEXT_TOKEN, "pooled": POOLED}
"""Every effect of the package, by name."""


def effect_of(rows: Sequence[Mapping[str, object]]) -> Effect:
    """The listed effect that these rows were measured with, by their keys; the next token where they don't say."""
    for effect in EFFECTS.values():
        if effect.answer is not None and any(f"{effect.answer.key}_replaced" in row for row in rows):
            return effect
    return NEXT_TOKEN
