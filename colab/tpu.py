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
# # On a TPU
#
# Train a transcoder over all chips of a TPU runtime, say beforehand what it needs, stop and resume it. The same cells
# run on a GPU runtime and on a CPU: a mesh of one device is a mesh. **Nobody has run this on a TPU yet**; programs for
# it are compiled by the real TPU compiler in our tests.
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
import numpy as np

from jaxinterp import fit, load, load_text, score
from jaxinterp.methods import SkipTranscoder
from jaxinterp.models.files.shapes import model_shapes
from jaxinterp.preflight.check import Setting, announce
from jaxinterp.preflight.chips import find
from jaxinterp.training.mesh import fetch, model_shardings, parse_mesh

print(jax.default_backend(), jax.device_count(), "devices")

# %% [markdown]
# ## How large
#
# Tokens are spread over `data`, dictionary rows over `feature`. On eight chips `data=2,feature=4` holds a dictionary of
# four times the width of one chip's.

# %%
MODEL, SITE, FEATURES, K, STEPS, BATCH = "tiny", "blocks/1/mlp", 256, 8, 40, 1024
# MODEL, SITE, FEATURES, K, STEPS, BATCH = "smollm2-135m", "blocks/15/mlp", 24_576, 32, 2000, 8192
DEVICES = jax.device_count()
MESH = f"data={DEVICES},feature=1" if DEVICES < 4 else f"data={DEVICES // 4},feature=4"

method = SkipTranscoder(features=FEATURES, k=K)
mesh = parse_mesh(MESH)
print(MESH)

# %% [markdown]
# ## What it will need
#
# Compiled for the devices of this runtime, from shapes alone: memory of a device, what is exchanged, time of a step.

# %%
fits = announce(
    method,
    lambda sharding: model_shapes(MODEL, sharding=sharding),
    SITE,
    target=find("auto"),
    setting=Setting(dict(mesh.shape), BATCH),
    steps=STEPS,
    seq=64,
)
print("it fits" if fits == 0 else "it does not fit")

# %% [markdown]
# ## Train half of it, and the rest
#
# Weights go straight to their devices. A run that is stopped goes on from its newest checkpoint, to the same bits as if
# it had not been stopped.

# %%
subject = load(MODEL, sharding=model_shardings(mesh))
train, heldout = load_text("docs", subject.tokenizer, seq=64, max_tokens=2 * BATCH * STEPS)
settings = {"site": SITE, "batch_size": BATCH, "mesh": mesh, "log_every": STEPS // 4}
whole = fit(method, subject, train, steps=STEPS, checkpoint="whole", **settings)


class Stop(Exception):
    """The runtime is taken away."""


def stop_half_way(row):
    if row["step"] >= STEPS // 2:
        raise Stop


try:
    fit(
        method,
        subject,
        train,
        steps=STEPS,
        checkpoint="stopped",
        save_every=STEPS // 4,
        track=(stop_half_way,),
        **settings,
    )
except Stop:
    print("stopped")
resumed = fit(method, subject, train, steps=STEPS, checkpoint="stopped", save_every=STEPS // 4, resume=True, **settings)
same = jax.tree.map(np.array_equal, fetch(whole.decomposition), fetch(resumed.decomposition))
print("the same bits:", all(jax.tree.leaves(same)))

# %% [markdown]
# ## Score it

# %%
row = score(fetch(resumed.decomposition), load(MODEL), heldout, tokens=2048, ce_tokens=1024)
print(f"FVU {row['fvu']:.3f}, L0 {row['l0']:.0f}, cross-entropy {row['ce_replaced']:.3f} ({row['ce_clean']:.3f} clean)")
