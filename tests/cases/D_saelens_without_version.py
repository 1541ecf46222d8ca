"""Kind D: a SAELens file without a version, of the residual stream of a LayerNorm model.

Such dictionaries were trained on streams whose mean was taken off. Right: refused with the reason, `centred=True` folds
the centring into the dictionary, and the codes are those of the centred stream.
"""

import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxinterp.errors import UserError
from jaxinterp.interchange import read

D, F = 6, 10
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, D)).astype(np.float32) + 0.7
ARRAYS = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
ARRAYS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in ARRAYS.items()}
CONFIG = {
    "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True, "lr": 0.1,
    "normalize_activations": "none", "reshape_activations": "none", "hook_point_layer": 0,
}  # fmt: skip


def attempt(label, hook, model, **options):
    folder = Path(tempfile.mkdtemp())
    save_file(ARRAYS, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(CONFIG | {"hook_point": f"blocks.0.{hook}", "model_name": model}))
    centred = X - X.mean(axis=1, keepdims=True)
    wanted = np.maximum((centred - ARRAYS["b_dec"]) @ ARRAYS["W_enc"] + ARRAYS["b_enc"], 0)
    try:
        found = read(folder, **options)
        codes = np.asarray(found.encode(jnp.asarray(X)).dense())
        print(
            "READ   ", label, f"-> codes differ from those of the centred stream by {np.abs(codes - wanted).max():.3f}"
        )
    except UserError as error:
        print("REFUSED", label, "->", str(error)[:300])
    except Exception as error:
        print("CRASH  ", label, "->", type(error).__name__, str(error)[:150])


attempt("gpt2-small, hook_resid_pre", "hook_resid_pre", "gpt2-small")
attempt("pythia-70m, hook_resid_post", "hook_resid_post", "pythia-70m")
attempt("gpt2-small, hook_mlp_out", "hook_mlp_out", "gpt2-small")
attempt("gpt2-small, centred=True", "hook_resid_pre", "gpt2-small", centred=True)
attempt("gemma-2b (RMSNorm sees the mean): as it is", "hook_resid_post", "gemma-2b")
