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
# # From a public dictionary to steering
#
# Read somebody's dictionary, check that it belongs to the model, find the feature for a concept, look where it fires,
# remove it, and steer with it at a strength that is matched in KL. As it is, the notebook makes its own "public" file
# on the tiny model, so that it needs no network and runs in a minute on two CPU cores; the commented lines take Gemma.
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
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxinterp import Add, fit, generate, load, load_text, run, score
from jaxinterp.causal.steer import matched_strength, steering_rows
from jaxinterp.interchange import probe, read, write
from jaxinterp.methods import SparseAutoencoder
from jaxinterp.report.questions import find_features, logits_of, top_contexts

# %% [markdown]
# ## A model, and a dictionary in another library's format
#
# `read` takes a name of SAELens's directory, a repository of the hub, or a folder; no PyTorch, no pickle. Given text,
# it tries the dictionary on the model and refuses one that explains nothing there.

# %%
MODEL, DICTIONARY, SITE = "tiny", "", "blocks/1/resid/post"
# MODEL, SITE = "google/gemma-2-2b", "blocks/12/resid/post"
# DICTIONARY = "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical"

subject = load(MODEL)
train, heldout = load_text("docs", subject.tokenizer, seq=64, max_tokens=200_000)
if not DICTIONARY:  # what somebody else would have published
    made = fit(
        SparseAutoencoder(features=128, k=8, learning_rate=1e-2),
        subject,
        train,
        site=SITE,
        steps=60,
        batch_size=1024,
        log_every=60,
    )
    DICTIONARY = str(write(made.decomposition, Path("published"), format="saelens"))
dictionary = read(DICTIONARY, site=SITE, subject=subject, tokens=train)
print(type(dictionary).__name__, dictionary.features, "features,", probe(dictionary, subject, heldout))
row = score(dictionary, subject, heldout, tokens=2048, ce_tokens=1024)
print(f"FVU {row['fvu']:.3f}, L0 {row['l0']:.1f}, cross-entropy {row['ce_replaced']:.3f} ({row['ce_clean']:.3f} clean)")

# %% [markdown]
# ## The feature for a concept
#
# Which features fire on a word, how exclusively; where one fires most; which tokens it raises directly.

# %%
CONCEPT = "the"
batches = [{name: heldout[number][name] for name in ("tokens", "weight")} for number in range(8)]
found = find_features(dictionary, subject, batches, CONCEPT)
for number, how_well in found[:3]:
    print(f"feature {number}: {how_well:.2f}")
feature = found[0][0]
for context in top_contexts(dictionary, subject, batches, [feature], contexts=3)[feature]:
    print(context)
print(logits_of(dictionary, subject, feature).raised[:5])

# %% [markdown]
# ## Remove it, and steer with it
#
# Removing: subtract what the feature writes wherever it is active. Steering: add its write vector, as strongly as costs
# .1 nats of KL on other prompts, beside a random direction at the same cost.

# %%
prompts = subject.tokens(["import the ", "returns the"])
codes = dictionary.encode(run(subject.model, prompts)[SITE].reshape(-1, dictionary.decoder.shape[1]))
active = codes.dense()[:, feature].reshape(prompts.shape)
direction = dictionary.output_scale * dictionary.decoder[feature]
clean = run(subject.model, prompts).logits
without = run(subject.model, prompts, edits={SITE: lambda x: x - active[..., None] * direction}).logits
print(f"removed: logits change by at most {float(jnp.abs(without - clean).max()):.3f}")

control = jax.random.normal(jax.random.key(0), direction.shape)
directions = {(SITE, "feature"): direction, (SITE, "random"): control / jnp.linalg.norm(control)}
for line in steering_rows(subject, directions, ["returns", "an array"], subject.ids(CONCEPT)[-1:], targets=(0.1,)):
    change = line["concept"] - line["concept_before"]
    print(f"{line['direction']}, after {line['context']!r}: KL {line['kl']:.3f}, concept {change:+.4f}")

strength = matched_strength(subject.model, prompts, SITE, direction, 0.1)
for name, edits in {"plain": {}, "steered": {SITE: Add(strength.value * direction)}}.items():
    print(f"{name}: {generate(subject, 'returns the', max_tokens=12, edits=edits).text!r}")
