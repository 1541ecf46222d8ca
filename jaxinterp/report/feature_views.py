"""What the page of a feature shows, computed: shades of its contexts, its histogram, how rare it is."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from jaxinterp.report.content import FeaturePage, TokenContext
from jaxinterp.report.plots import bar_chart
from jaxinterp.report.style import LEVELS
from jaxinterp.report.text import Number, finite, token_html


@dataclass(frozen=True)
class FeatureView:
    """A feature as it is shown; `contexts` are pairs of the largest activation and the text, shaded."""

    page: FeaturePage
    contexts: tuple[tuple[Number, Markup], ...]
    quantiles: tuple[tuple[str, tuple[tuple[Number, Markup], ...]], ...]
    histogram: Markup | None
    rarity: float | None
    largest_logit: float
    largest_later: float


def views(features: Sequence[FeaturePage]) -> tuple[FeatureView, ...]:
    """What the page shows of every feature."""
    return tuple(map(_view, features))


def _view(feature: FeaturePage) -> FeatureView:
    sizes = [abs(a) for context in feature.contexts for a in context.activations if finite(a)]
    scale = max([*sizes, abs(feature.max_activation) if finite(feature.max_activation) else 0.0])
    logits = [abs(logit) for _, logit in (*feature.raised, *feature.lowered) if finite(logit)]
    later = [abs(nats) for _, nats in (*feature.later_raised, *feature.later_lowered) if finite(nats)]
    return FeatureView(
        page=feature,
        contexts=_shaded(feature.contexts, scale),
        quantiles=tuple((name, _shaded(contexts, scale)) for name, contexts in feature.quantiles),
        histogram=Markup(_histogram(feature)) if feature.histogram_counts else None,
        rarity=1 / feature.density if finite(feature.density) and feature.density > 0 else None,
        largest_logit=max(logits, default=1.0),
        largest_later=max(later, default=1.0),
    )


def _shaded(contexts: Sequence[TokenContext], scale: Number) -> tuple[tuple[Number, Markup], ...]:
    return tuple((one.activations[one.peak], Markup(_snippet(one, scale))) for one in contexts)


def _snippet(context: TokenContext, scale: Number) -> str:
    """The text of a context; tokens on which the feature is silent are plain text, to keep the page small."""
    pieces = []
    for place, (token, activation) in enumerate(zip(context.tokens, context.activations, strict=True)):
        # The space before the first word would only indent the first line.
        shown = token[1:] if place == 0 and place != context.peak and token[:1] == " " and token.strip() else token
        text = token_html(shown, alone=place == context.peak)
        name = _shade(activation, scale)
        if place == context.peak:
            pieces.append(f'<mark class="{name}" title="{activation:.3g}">{text}</mark>')
        elif name:
            pieces.append(f"<i class={name} title={activation:.3g}>{text}</i>")
        else:
            pieces.append(text)
    return "".join(pieces)


def _shade(activation: Number, scale: Number) -> str:
    """The class of a colour: a1 (faint) to a9 for activations above zero, n1 to n9 below; empty for silence."""
    if not finite(activation) or activation == 0 or scale <= 0:
        return ""
    level = min(LEVELS, max(1, -int(-LEVELS * abs(activation) // scale)))
    return f"{'a' if activation > 0 else 'n'}{level}"


def _histogram(feature: FeaturePage) -> str:
    title = f"Histogram of the activations of feature {feature.index}"
    edges, counts = feature.histogram_edges, feature.histogram_counts
    return bar_chart(edges, counts, title=title, log_y=True, width=360, height=170, hover=False)
