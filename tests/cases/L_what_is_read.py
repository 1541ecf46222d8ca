"""Kind L: reading with a probe must change nothing of the file, and tell what is doubtful.

Right: the stored training mean and variance are those of the file; a dictionary read at a neighbouring layer, or with
`apply_b_dec_to_input` flipped, is told in a warning that names the way out.
"""

import json
import tempfile
import warnings
from pathlib import Path

import grain
import jax.numpy as jnp
import numpy as np

from jaxinterp import load, run
from jaxinterp.decompositions.activations import ReLU
from jaxinterp.errors import UserError
from jaxinterp.interchange import read, write
from jaxinterp.interchange.contents import Contents, build

try:
    from jaxinterp.core.batch import Sites
except ImportError:  # 099a747
    from jaxinterp.core.sites import Sites

subject = load("tiny")
D = subject.model.config.d_model
ids = np.random.default_rng(0).integers(0, 256, (64, 32), np.int32)
weight = np.r_[0, np.ones(31)].astype(np.float32)
text = grain.MapDataset.source(
    [{"tokens": row, "weight": weight, "document": np.full(32, i, np.int32)} for i, row in enumerate(ids)]
)


def trained_at(site):
    """A linear autoencoder of most of the variance at a site, as positive and negative parts."""
    rows = np.asarray(run(subject.model, jnp.asarray(ids[:32]))[site])[:, 1:].reshape(-1, D)
    mean = rows.mean(axis=0)
    vectors = np.linalg.svd(rows - mean, full_matrices=False)[2][: D * 7 // 8]
    both = np.concatenate([vectors, -vectors]).astype(np.float32)
    parts = Contents(both, np.zeros(len(both), np.float32), both, mean.astype(np.float32), ReLU(), True, False)
    return build(parts, Sites(site, site))


def attempt(label, path, **options):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = read(path, subject=subject, tokens=text, **options)
            print("READ   ", label, [str(one.message)[:250] for one in told] or "not a word")
            return found
        except UserError as error:
            print("REFUSED", label, "->", str(error)[:300])
    return None


made = trained_at("blocks/0/resid/post")
mean, variance = jnp.linspace(-1, 1, D), jnp.asarray(3.5)
folder = write(made.__class__(**vars(made) | {"target_mean": mean, "target_variance": variance}),
               Path(tempfile.mkdtemp()) / "a", format="saelens")  # fmt: skip
found = attempt("at its own site", folder)
if found is not None:
    print("  the stored mean is kept:", bool(np.array_equal(found.target_mean, mean)), "; differs by",
          float(jnp.abs(found.target_mean - mean).max()))  # fmt: skip
(folder / "jaxinterp_sites.json").unlink()
attempt("a neighbouring layer", folder, site="blocks/1/resid/post")
config = json.loads((folder / "cfg.json").read_text())
(folder / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": not config["apply_b_dec_to_input"]}))
attempt("apply_b_dec_to_input flipped", folder, site="blocks/0/resid/post")
