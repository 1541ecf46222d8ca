"""Feature files for circuit-tracer's local server: what a click on a feature shows there.

`features/{scan}/{Cantor number}.json`: index, examples_quantiles [{quantile_name, examples [{tokens, tokens_acts_list,
train_token_ind}]}], top_logits, bottom_logits.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxinterp.causal.graphs.contexts import About
from jaxinterp.causal.graphs.schema import cantor
from jaxinterp.core.json_value import Json


def feature_file(layer: int, index: int, about: About, token_text: Callable[[int], str]) -> dict[str, Json]:
    """One feature in that form."""
    examples = [
        {
            "tokens": [token_text(id) for id in context.tokens],
            "tokens_acts_list": list(context.activations),
            "train_token_ind": context.peak,
            "is_repeated_datapoint": False,
        }
        for context in about.contexts
    ]
    highest = max((context.activations[context.peak] for context in about.contexts), default=0.0)
    return {
        "index": cantor(layer, index),
        "examples_quantiles": [{"quantile_name": "Top activations", "examples": examples}],
        "top_logits": [token_text(id) for id, _ in about.raised],
        "bottom_logits": [token_text(id) for id, _ in about.lowered],
        "act_min": 0.0,
        "act_max": highest,
    }


def write_feature_files(
    about: Mapping[tuple[int, int], About], folder: str | Path, token_text: Callable[[int], str]
) -> Path:
    """Write one file a feature, into a folder named like the graph's `scan`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for (layer, index), own in about.items():
        content = feature_file(layer, index, own, token_text)
        (folder / f"{cantor(layer, index)}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    return folder
