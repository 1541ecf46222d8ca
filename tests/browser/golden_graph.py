"""A tiny graph, made from a model to files, that circuit-tracer's frontend draws in `make frontend`.

    python -m tests.browser.golden_graph      writes tests/browser/goldens/graph again

The suite checks that our code still makes these files; `tests/browser/frontend.py` checks what the frontend makes of
them.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.causal.graphs.build import choose_targets, graph_of
from jaxinterp.causal.graphs.capture import capture
from jaxinterp.causal.graphs.contexts import About, Context
from jaxinterp.causal.graphs.frontend import write_feature_files
from jaxinterp.causal.graphs.prune import prune
from jaxinterp.causal.graphs.schema import graph_json, write_graph_json
from jaxinterp.causal.graphs.transcoders import from_arrays
from jaxinterp.models.transformer import TransformerConfig, initialise

FOLDER = Path(__file__).parent / "goldens" / "graph"
SLUG, SCAN = "tiny-graph", "tiny-model"
WORDS = ("the", " cat", " sat", " on", " a", " mat", "\n", " and", ' "so"', " é", " <b>", " end")
PROMPT = np.array([0, 1, 6, 8, 10, 9])
FEATURES = 8
CONFIG = TransformerConfig(
    vocab_size=len(WORDS), d_model=8, layers=2, heads=2, kv_heads=1, head_dim=4, d_mlp=10, context=16,
    rotary_dimensions=4,
)  # fmt: skip


def write_golden_graph(folder: Path) -> Path:
    """graph_data/, data/ and features/, as circuit-tracer's local server has them; float64."""
    rng = np.random.default_rng(7)
    shape = (CONFIG.layers, FEATURES, CONFIG.d_model)
    encoders, decoders = rng.normal(size=shape), 0.3 * rng.normal(size=shape)
    encoder_biases = 0.3 * rng.normal(size=shape[:2])
    decoder_biases = 0.2 * rng.normal(size=(CONFIG.layers, CONFIG.d_model))
    with jax.enable_x64(True):
        model = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), initialise(CONFIG, jax.random.key(3)))
        transcoders = from_arrays(list(encoders), list(encoder_biases), list(decoders), list(decoder_biases))
        captured = capture(model, PROMPT, transcoders)
        graph = graph_of(captured, choose_targets(captured, probability=0.999, most=3))
    kept = prune(graph, node_threshold=0.95, edge_threshold=0.98)
    chosen = {(int(layer), int(index)) for layer, _, index in graph.features[kept.nodes[: len(graph.features)]]}
    about = {place: _about(*place) for place in sorted(chosen)}
    document = graph_json(
        graph, kept, slug=SLUG, scan=SCAN, prompt="".join(WORDS[id] for id in PROMPT), token_text=WORDS.__getitem__,
        labels={place: own.label(WORDS.__getitem__) for place, own in about.items()}, node_threshold=0.95,
    )  # fmt: skip
    write_graph_json(document, folder / f"{SLUG}.json")
    write_feature_files(about, folder / "features", WORDS.__getitem__)
    return folder


def _about(layer: int, index: int) -> About:
    """Contexts and logits that differ from feature to feature."""
    peak = 4 * layer + index
    tokens = tuple((peak + step) % len(WORDS) for step in (-1, 0, 1))
    context = Context(tokens, (0.0, 1.0 + index, 0.25), 1)
    return About(0.1, (context,), ((peak, 2.0),), (((peak + 5) % len(WORDS), -1.0),))


if __name__ == "__main__":
    write_golden_graph(FOLDER)
