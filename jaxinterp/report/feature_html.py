"""The features on the page: an index that can be sorted, and one article a feature."""

from collections.abc import Sequence

from jaxinterp.report.content import FeaturePage, NeuronMatch, TokenContext
from jaxinterp.report.plots import bar_chart
from jaxinterp.report.text import Number, count, finite, fixed, number, token_html

_LEVELS = 9  # shades of the style sheet


def feature_section(features: Sequence[FeaturePage]) -> str:
    """The index beside the articles, as HTML."""
    if not features:
        return '<p class="empty">No features were selected.</p>'
    heads = (
        ("Feature", "number", "The feature's index in the dictionary."),
        ("Density", "number", "Fraction of held-out tokens on which it fires."),
        ("Max", "number", "Its largest activation on held-out text."),
        ("Cosine", "number", "Cosine of its read and write vectors."),
        ("Top token", "text", "The token with the largest activation."),
    )
    cells = "".join(
        f'<th scope="col" data-sort="{kind}" title="{why}"><span>{name}</span></th>' for name, kind, why in heads
    )
    rows = "".join(map(_index_row, features))
    articles = "".join(
        _article(
            feature, *(features[place].index if 0 <= place < len(features) else None for place in (at - 1, at + 1))
        )
        for at, feature in enumerate(features)
    )
    return (
        '<div class="features"><div class="card index" tabindex="0" aria-label="Index of features">'
        f"<table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<div id="pages">{articles}</div></div>'
    )


def _index_row(feature: FeaturePage) -> str:
    values = (feature.index, feature.density, feature.max_activation, feature.read_write_cosine)
    shown = (
        f'<a href="#feature-{feature.index}">{feature.index}</a>',
        _rate(feature.density),
        number(feature.max_activation),
        fixed(feature.read_write_cosine, 2),
    )
    cells = "".join(
        f'<td data-value="{repr(float(value)) if finite(value) else ""}">{text}</td>'
        for value, text in zip(values, shown, strict=True)
    )
    return f"<tr>{cells}<td>{_top_token(feature)}</td></tr>"


def _article(feature: FeaturePage, before: int | None, after: int | None) -> str:
    steps = "".join(
        f'<a data-move="{move}" href="#feature-{feature.index if other is None else other}" title="{key}">{name}</a>'
        for move, other, key, name in ((-1, before, "Left arrow", "← previous"), (1, after, "Right arrow", "next →"))
    )
    rarity = f" (1 in {count(1 / feature.density)})" if finite(feature.density) and feature.density > 0 else ""
    facts = (
        ("fires on", _rate(feature.density), f" of tokens{rarity}"),
        ("largest activation", number(feature.max_activation), ""),
        ("read/write cosine", fixed(feature.read_write_cosine, 3), ""),
    )
    said = "".join(f"<span>{name} <b>{value}</b>{rest}</span>" for name, value, rest in facts)
    panels = (
        _panel("Activation when it fires", "tokens, log scale", _histogram(feature)),
        _panel("Most similar MLP neurons", "cosine", _neurons(feature.neurons)),
        _panel("Logits it raises", "direct path", _logits(feature.raised, feature)),
        _panel("Logits it lowers", "direct path", _logits(feature.lowered, feature)),
    )
    return (
        f'<article class="card feature" id="feature-{feature.index}"><header><h3 class="name">Feature {feature.index}'
        f'<code>{_top_token(feature)}</code></h3><span class="step"><span class="place"></span>{steps}</span></header>'
        f'<div class="facts">{said}</div>{_contexts(feature)}<div class="panels">{"".join(panels)}</div></article>'
    )


def _contexts(feature: FeaturePage) -> str:
    if not feature.contexts:
        return '<p class="empty">It never fired on the held-out text.</p>'
    scale = max((abs(a) for context in feature.contexts for a in context.activations if finite(a)), default=0.0)
    if finite(feature.max_activation):
        scale = max(scale, abs(feature.max_activation))
    items = "".join(
        f"<li><b>{number(context.activations[context.peak])}</b>"
        f'<div class="snippet">{_snippet(context, scale)}</div></li>'
        for context in feature.contexts
    )
    return f'<ol class="contexts">{items}</ol>'


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
    level = min(_LEVELS, max(1, -int(-_LEVELS * abs(activation) // scale)))
    return f"{'a' if activation > 0 else 'n'}{level}"


def _histogram(feature: FeaturePage) -> str:
    if not feature.histogram_counts:
        return '<p class="empty">Not computed.</p>'
    title = f"Histogram of the activations of feature {feature.index}"
    edges, counts = feature.histogram_edges, feature.histogram_counts
    return bar_chart(edges, counts, title=title, log_y=True, width=360, height=170, hover=False)


def _neurons(neurons: Sequence[NeuronMatch]) -> str:
    if not neurons:
        return '<p class="empty">No neurons to compare with at this site.</p>'
    rows = "".join(
        f"<tr><td>{neuron.index}</td>{_metered(neuron.write_cosine, 1.0, 2)}{_metered(neuron.read_cosine, 1.0, 2)}</tr>"
        for neuron in neurons
    )
    return (
        '<div class="neurons"><table><thead><tr><th scope="col">neuron</th><th scope="col">write vector</th>'
        f'<th scope="col">read vector</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _logits(logits: Sequence[tuple[str, float]], feature: FeaturePage) -> str:
    if not logits:
        return '<p class="empty">Not computed.</p>'
    scale = max((abs(logit) for _, logit in (*feature.raised, *feature.lowered) if finite(logit)), default=1.0)
    rows = "".join(
        f"<tr><td>{token_html(token, alone=True)}</td>{_metered(logit, scale, 3)}</tr>" for token, logit in logits
    )
    return f'<div class="logits"><table><tbody>{rows}</tbody></table></div>'


def _metered(value: Number | None, scale: Number, decimals: int) -> str:
    """A table cell: a number, and its share of `scale` in percent, which the style sheet draws as a bar."""
    if not finite(value):
        return f"<td>{fixed(value, decimals)}</td>"
    length = round(100 * min(abs(value) / scale, 1)) if scale > 0 else 0
    return f"<td{' class=n' * (value < 0)} style=--w:{length}>{fixed(value, decimals)}</td>"


def _rate(density: Number) -> str:
    """A firing frequency as percent with two significant digits: frequencies span five decades."""
    return number(100 * density, 2) + "\u202f%" if finite(density) else number(density)


def _panel(title: str, note: str, body: str) -> str:
    return f'<div class="panel"><h3>{title}<small>{note}</small></h3>{body}</div>'


def _top_token(feature: FeaturePage) -> str:
    if not feature.contexts:
        return token_html("")
    first = feature.contexts[0]
    return token_html(first.tokens[first.peak], alone=True)
