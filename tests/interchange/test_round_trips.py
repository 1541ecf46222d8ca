"""What is written is read back: arrays to the last bit, outputs equal; what a format cannot hold is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.data.batch import Sites
from jaxinterp.decompositions.activations import BatchTopK, ReLU, TopK
from jaxinterp.decompositions.adaptive import TopAFA
from jaxinterp.decompositions.by_effect import EffectDictionary
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.errors import UserError
from jaxinterp.interchange import as_jumprelu, read, write
from jaxinterp.trees import named_leaves
from tests.interchange.written import CASES, FEATURES, INPUTS, MLP, at, dictionary, gated

EXACT = [(name, {}) for name in CASES if name != "sparsify_sae"]
EXACT += [(name, {"centred": True}) for name in CASES if "transcoder" not in name and "skip" not in name]
EXACT += [("transcoder", {"known": False})]


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b), "sites, k or another static field differ"
    for name, leaf in named_leaves(a).items():
        other = named_leaves(b)[name]
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other, err_msg=name)


@pytest.mark.parametrize(("name", "how"), EXACT)
def test_round_trips_are_exact(name: str, how: dict[str, bool], tmp_path: Path) -> None:
    """Invariant 7."""
    format, make = CASES[name]
    made = make(**how)
    if name == "gated":  # SAELens has no bias that gate and size share; one is split among theirs
        made = replace(made, encoder_bias=jnp.zeros(FEATURES))
    found = read(write(made, tmp_path / "it", format=format))
    assert_same(made, found)
    np.testing.assert_array_equal(made(INPUTS), found(INPUTS))


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, {"scaled": True}) for name in CASES] + [("sparsify_sae", {}), ("sparsify_transcoder", {"centred": True})],
    ids=str,
)
def test_scales_are_folded_once(name: str, how: dict[str, bool], tmp_path: Path) -> None:
    format, make = CASES[name]
    made = make(**how)
    found = read(write(made, tmp_path / "it", format=format))
    np.testing.assert_allclose(found.encode(INPUTS).dense(), made.encode(INPUTS).dense(), atol=1e-5)
    np.testing.assert_allclose(found(INPUTS), made(INPUTS), atol=1e-5)
    assert found.sites == made.sites and float(found.input_scale) == 1
    assert_same(found, read(write(found, tmp_path / "again", format=format)))


def test_a_logarithm_of_thresholds_is_written_as_thresholds(tmp_path: Path) -> None:
    jump = JumpReLU(jnp.linspace(-3, 0, FEATURES), "log", 0.1)
    found = read(write(dictionary(jump, at("blocks/0/mlp/out")), tmp_path, format="saelens"))
    np.testing.assert_array_equal(found.activation.threshold, jnp.exp(jnp.linspace(-3, 0, FEATURES)))


def test_batch_topk_is_written_as_the_jumprelu_that_it_is(tmp_path: Path) -> None:
    made = dictionary(BatchTopK(12, jnp.asarray(0.4)), at("blocks/0/mlp/out"))
    with pytest.raises(UserError, match=r"BatchTopK keeps at most 4 k .* as_jumprelu"):
        write(made, tmp_path, format="saelens")
    found = read(write(as_jumprelu(made), tmp_path, format="saelens"))
    np.testing.assert_allclose(found.encode(INPUTS).dense(), made.encode(INPUTS).dense(), atol=1e-6)
    with pytest.raises(UserError, match="activation=ReLU is no BatchTopK"):
        as_jumprelu(dictionary(ReLU(), MLP))


@pytest.mark.parametrize(
    ("format", "made", "message"),
    [
        ("saelens", dictionary(TopK(4), MLP), "activation=TopK: SAELens has no such transcoders.*format='sparsify'"),
        ("saelens", dictionary(gated(), MLP), "activation=Gated: SAELens has no such transcoders"),
        (
            "saelens",
            dictionary(ReLU(), at("blocks/1/mlp/out"), skip=True),
            "ReLU with a skip path: SAELens has no such",
        ),
        ("saelens", dictionary(ReLU(), at("embed")), "site 'embed' has no name in SAELens files"),
        ("saelens", dictionary(TopAFA(), at("blocks/1/mlp/out")), "activation=TopAFA compares"),
        ("sparsify", dictionary(ReLU(), MLP), "activation=ReLU: sparsify has TopK only"),
        ("sparsify", dictionary(TopK(4), MLP, d_out=10), "d_in=12 is not d_out=10"),
        ("sparsify", dictionary(TopK(4), at("blocks/1/mlp/out"), skip=True), "may copy its input"),
        ("gemma_scope", dictionary(ReLU(), MLP), "format='gemma_scope' cannot be written; .*saelens, sparsify"),
        (
            "saelens",
            dictionary(ReLU(), Sites(("a", "b"), "c")),
            "no format here has dictionaries that read or write sev",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(format: Any, made: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write(made, tmp_path / "it", format=format)
    assert not (tmp_path / "it").exists(), "nothing was begun"


def test_nothing_is_overwritten_and_no_other_class_written(tmp_path: Path) -> None:
    made = dictionary(ReLU(), MLP)
    write(made, tmp_path, format="saelens")
    with pytest.raises(UserError, match="is there already"):
        write(made, tmp_path, format="saelens")
    with pytest.raises(UserError, match="a EffectDictionary has no place in format='sparsify'"):
        write(EffectDictionary(dictionary(TopK(4), MLP), MLP), tmp_path, format="sparsify")


def test_sites_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    place = write(dictionary(TopK(4), MLP), tmp_path / "layers.3.mlp", format="sparsify")
    assert read(place).sites == MLP
    with pytest.raises(UserError, match=r"reads='blocks/3/mlp/in'.* and the folder's name 'layers.4.mlp' contradict"):
        read(place.rename(tmp_path / "layers.4.mlp"))
    (tmp_path / "layers.4.mlp" / "jaxinterp_sites.json").unlink()
    assert read(tmp_path / "layers.4.mlp").sites == Sites("blocks/4/mlp/in", "blocks/4/mlp/out")
    bare = (tmp_path / "layers.4.mlp").rename(tmp_path / "run7")
    with pytest.raises(UserError, match=r"the folder's name 'run7' is no module .* pass site="):
        read(bare)
    assert read(bare, site="blocks/2/mlp").sites == Sites("blocks/2/mlp/in", "blocks/2/mlp/out")


def test_added_and_out_are_told_apart(tmp_path: Path) -> None:
    """SAELens has one name for both; without our own file, the name of the model decides."""
    for port, other in (("added", "out"), ("out", "out")):
        made = replace(dictionary(ReLU(), MLP), sites=Sites("blocks/3/mlp/in", f"blocks/3/mlp/{port}"))
        place = write(made, tmp_path / port, format="saelens")
        assert read(place).sites == made.sites
        (place / "jaxinterp_sites.json").unlink()
        assert read(place).sites.writes == f"blocks/3/mlp/{other}"
        config = (place / "cfg.json").read_text()
        (place / "cfg.json").write_text(
            config.replace('"hook_name":', '"model_name": "google/gemma-2-2b", "hook_name":')
        )
        assert read(place).sites.writes == "blocks/3/mlp/added"
