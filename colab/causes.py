# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a prompt to a graph, to an intervention, to other text
#
# Train transcoders for all MLPs of a model, draw the attribution graph of one prompt, test what the graph predicts by
# changing a feature, and generate text with that feature changed. On the tiny model everything below runs in about two
# minutes on two CPU cores.
#
# ## Install
#
# If jaxinterp is installed, the next cell does nothing. Otherwise it installs the clone that this notebook lies
# in, or a wheel beside it (on Colab: `pip wheel --no-deps .` in a clone, and upload the file), or what `SOURCE` names.
# On a GPU or TPU runtime, ask for the matching JAX as well, for instance `jaxinterp[cuda] @ git+https://...`.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("jaxinterp") is None:
    SOURCE = ""  # "git+https://..." or the path of a clone; "" takes a clone around this notebook, or a wheel beside it
    folders = [Path.cwd(), *Path.cwd().parents]
    found = [each for each in folders if (each / "jaxinterp").is_dir() and (each / "pyproject.toml").is_file()]
    found += sorted(Path.cwd().glob("jaxinterp-*.whl"))
    if not SOURCE and not found:
        sys.exit(
            "jaxinterp is not installed, and no clone or wheel of it was found here. Three ways: write its address "
            "into SOURCE above and run the cell again; open this notebook inside a clone; or upload jaxinterp-*.whl "
            "beside it."
        )
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", SOURCE or str(found[0])], check=True)
    importlib.invalidate_caches()

# %%
import equinox as eqx
import jax
import numpy as np
from IPython.display import HTML, display

from jaxinterp import fit, generate, load, load_text, replace, select
from jaxinterp.causal.graphs.build import choose_targets, graph_of
from jaxinterp.causal.graphs.capture import capture
from jaxinterp.causal.graphs.contexts import about_features
from jaxinterp.causal.graphs.influence import node_influence, replacement_score
from jaxinterp.causal.graphs.intervene import intervene, total_effects
from jaxinterp.causal.graphs.prune import prune
from jaxinterp.causal.graphs.schema import graph_json
from jaxinterp.causal.graphs.transcoders import transcoders_of
from jaxinterp.data.text.load_text import take
from jaxinterp.decompositions.stand_in import StandIn
from jaxinterp.methods import Transcoder
from jaxinterp.methods.combine.per_layer_transcoders import PerLayerTranscoders
from jaxinterp.report.graph import write_graph_page

# %% [markdown]
# ## A model and its transcoders
#
# `tiny` has random weights and planted MLPs, so the text that it writes means nothing; take the commented line for a
# language model that was trained (minutes on a CPU).

# %%
MODEL, PROMPT, FEATURES, K, STEPS = "tiny", "the end of the", 128, 8, 80
# MODEL, PROMPT, FEATURES, K, STEPS = "bilinear-4x128", "the end of the", 1024, 16, 200
BATCH, SEQ = 1024, 64

subject = load(MODEL)
train, heldout = load_text("docs", subject.tokenizer, seq=SEQ, max_tokens=3 * BATCH * STEPS)
method = PerLayerTranscoders(Transcoder(features=FEATURES, k=K, activation="topk", learning_rate=1e-2))
result = fit(method, subject, train, site="blocks/*/mlp", steps=STEPS, batch_size=BATCH, log_every=STEPS)
transcoders = transcoders_of(result.decomposition)
print(f"{len(result.decomposition.parts)} transcoders of {FEATURES} features")

# %% [markdown]
# ## The graph
#
# Nodes are the features that are active on the prompt, what each transcoder misses (errors), the tokens, and the most
# probable next tokens. An edge is an exact linear effect while attention patterns and norm scales are held. All effects
# on a node and its constants add up to its value: the sum rule.

# %%
captured = capture(subject, PROMPT, transcoders)
graph = graph_of(captured, choose_targets(captured))
kept = prune(graph, node_threshold=0.8, edge_threshold=0.98)
missed = float(np.abs(graph.sum_rule()).max() / np.abs(graph.value).max())
print(f"{len(graph.features)} features are active, {int(kept.nodes.sum())} of {len(kept.nodes)} nodes are kept")
print(f"the sum rule is missed by {missed:.1e}; replacement score {replacement_score(graph):.2f}")

influence = node_influence(graph)[: len(graph.features)]
for number in np.argsort(-influence)[:5]:
    layer, position, index = graph.features[number]
    print(f"layer {layer}, position {position}, feature {index}: influence {influence[number]:.3f}")

# %% [markdown]
# The page shows layers by positions: click a node to see its inputs, its outputs, where it fires and which tokens it
# makes more probable. It is one file without a server: open it in a browser, or below.

# %%
token_text = subject.tokenizer.token_text
chosen = sorted({(int(layer), int(index)) for layer, _, index in graph.features[kept.nodes[: len(graph.features)]]})
windows = [
    {name: np.asarray(batch[name])[row] for name in ("tokens", "weight")}
    for batch in take(heldout, 4096, seed=0)
    for row in range(len(batch["tokens"]))
]
about = about_features(captured.model, transcoders, chosen, windows)
labels = {place: own.label(token_text) for place, own in about.items()}
document = graph_json(graph, kept, slug="graph", scan=MODEL, prompt=PROMPT, token_text=token_text, labels=labels)
page = write_graph_page(graph, kept, document, "graph.html", token_text=token_text, about=about)
print(f"{page.name}: {len(document['nodes'])} nodes, {len(document['links'])} links")
display(HTML(f'<a href="{page.name}" target="_blank">open the graph</a>'))

# %% [markdown]
# ## An intervention
#
# The graph says what removing a feature does to the logits. `intervene` does it: "frozen" holds attention patterns and
# norm scales, as the graph does, and lets every other feature answer; "free" computes everything anew.

# %%
strongest = tuple(int(value) for value in graph.features[np.argmax(influence)])
activation = float(graph.activation[np.argmax(influence)])
predicted = total_effects(graph, {strongest: -activation})[graph.targets]
before = captured.seen.logits[-1]
read = captured.unembedding[:, graph.target_tokens] - captured.unembedding.mean(axis=1, keepdims=True)
for mode in ("frozen", "free"):
    after = intervene(captured, {strongest: 0.0}, mode=mode).final[-1]
    change = np.asarray((after - captured.seen.final[-1]) @ read)
    print(f"{mode}: first logit changes by {change[0]:+.4f}, predicted {float(predicted[0]):+.4f}")

# %% [markdown]
# ## Other text
#
# A transcoder in the MLP's place offers its codes as an array, so that a feature is changed by an edit. `keep_error`
# adds what the transcoder misses: without an edit the model is as it was.

# %%
layer, _, index = strongest


class Scaled(eqx.Module):
    """The edit that multiplies one feature."""

    index: int = eqx.field(static=True)
    factor: float = eqx.field(static=True)

    def __call__(self, codes: jax.Array) -> jax.Array:
        return codes.at[..., self.index].multiply(self.factor)


leaf = f"blocks/{layer}/mlp"
stand_in = StandIn(select(subject.model, leaf).get(), result.decomposition.parts[layer], keep_error=True)
inside = type(subject)(replace(subject.model, {leaf: stand_in}), subject.tokenizer, subject.name)
plain = generate(subject, PROMPT, max_tokens=16)
for factor in (1.0, 0.0, 200.0):
    out = generate(inside, PROMPT, max_tokens=16, edits={f"{leaf}/codes": Scaled(index, factor)})
    print(f"feature times {factor:g}: {out.text!r}, the model's own text: {out.tokens == plain.tokens}")
