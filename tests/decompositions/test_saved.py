"""`save` and `load_decomposition`: one pair of functions for every kind, and nothing overwritten silently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.cross_layer import PerLayer
from jaxinterp.decompositions.saved import load_decomposition, save
from jaxinterp.methods import CrossLayerTranscoder, JumpReLUSparseAutoencoder, SkipTranscoder

ROWS = jax.random.normal(jax.random.key(0), (16, 4))


def made(method, reads="blocks/0/mlp/in", writes="blocks/0/mlp/out"):
    names = [name for each in (reads, writes) for name in ([each] if isinstance(each, str) else each)]
    batch = make_batch(dict.fromkeys(names, ROWS), jnp.ones(16), Sites(reads, writes))
    return method.recipe(10).init(jax.random.key(1), batch, None).decomposition


def kinds():
    skip = made(SkipTranscoder(features=8, k=2))
    yield skip
    yield made(JumpReLUSparseAutoencoder(features=8), "blocks/0/mlp/out")
    two = tuple(f"blocks/{layer}/mlp/in" for layer in (0, 1)), tuple(f"blocks/{layer}/mlp/out" for layer in (0, 1))
    yield made(CrossLayerTranscoder(features=8), *two)
    yield PerLayer((skip, made(SkipTranscoder(features=4, k=2), "blocks/1/mlp/in", "blocks/1/mlp/out")))


def test_every_kind_comes_back_and_nothing_is_overwritten_silently(tmp_path):
    for number, decomposition in enumerate(kinds()):
        folder = save(decomposition, tmp_path / str(number))
        back = load_decomposition(folder)
        assert type(back) is type(decomposition) and back.sites == decomposition.sites
        leaves = named_leaves(back)
        for name, leaf in named_leaves(decomposition).items():
            np.testing.assert_array_equal(leaves[name], leaf, err_msg=name)
        with pytest.raises(UserError, match="is not empty: pass overwrite=True"):
            save(decomposition, folder)
        save(decomposition, folder, overwrite=True)


def test_what_is_no_decomposition_is_told_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"a dict has no form on disk: .* of a Fit, its .decomposition"):
        save({"encoder": 1}, tmp_path / "x")
    save(next(kinds()), tmp_path / "run" / "dictionary")
    with pytest.raises(UserError, match=r"no decomposition in .*run: .* Did you mean .*run/dictionary\?"):
        load_decomposition(tmp_path / "run")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "per_layer.json").write_text("{}")
    with pytest.raises(UserError, match=r"per_layer.json is damaged"):
        load_decomposition(tmp_path / "broken")
