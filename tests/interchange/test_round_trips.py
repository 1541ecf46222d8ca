"""What is written is read back: arrays to the last bit, outputs equal; what a format cannot hold is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.activations import BatchTopK, ReLU, TopK
from jaxinterp.decompositions.adaptive import TopAFA
from jaxinterp.decompositions.by_effect import EffectDictionary
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.interchange import as_jumprelu, read, write
from tests.interchange.written import CASES, FEATURES, INPUTS, MLP, D, at, dictionary, gated

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
    with pytest.raises(UserError, match="activation=ReLU is not a BatchTopK"):
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
        ("sparsify", dictionary(ReLU(), MLP), "activation=ReLU: sparsify has TopK and GroupMax only"),
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


@pytest.mark.parametrize(
    ("format", "file"),
    [
        ("saelens", "cfg.json"),
        ("saelens", "jaxinterp_sites.json"),
        ("sparsify", "cfg.json"),
        ("sparsify", "jaxinterp_sites.json"),
    ],
)
def test_no_file_of_a_format_is_overwritten(format: Any, file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("mine")
    with pytest.raises(UserError, match=f"{file} is there already: nothing is overwritten"):
        write(dictionary(TopK(4), at("blocks/2/resid/post")), tmp_path, format=format)
    assert [path.name for path in tmp_path.iterdir()] == [file] and (tmp_path / file).read_text() == "mine"
    with pytest.raises(UserError, match="is there already and no folder"):
        write(dictionary(TopK(4), at("blocks/2/resid/post")), tmp_path / file, format=format)


def test_a_broken_dictionary_is_not_written(tmp_path: Path) -> None:
    made, jump = dictionary(ReLU(), MLP), dictionary(JumpReLU(jnp.full(FEATURES, jnp.inf), "raw", 0.1), MLP)
    for name, bad in (
        ("decoder", replace(made, decoder=made.decoder.at[3, 2].set(jnp.nan))),
        ("encoder_bias", replace(made, input_mean=jnp.full_like(made.input_mean, jnp.nan))),
        ("activation/threshold_parameter", jump),
    ):
        with pytest.raises(UserError, match=f"{name} has values that are NaN or infinite"):
            write(bad, tmp_path / "it", format="saelens")
    assert not (tmp_path / "it").exists()


def test_a_folder_that_its_reader_would_refuse_is_not_written(tmp_path: Path) -> None:
    for name, sites in (("layers.4.mlp", MLP), ("layers.3.mlp", at("blocks/3/mlp/added")), ("layers.3", MLP)):
        with pytest.raises(UserError, match=rf"the folder's name '{name}' contradict each other: .* another folder"):
            write(dictionary(TopK(4), sites), tmp_path / name, format="sparsify")
        assert not (tmp_path / name).exists()
    assert read(write(dictionary(TopK(4), MLP), tmp_path / "layers.3.mlp" / "seed1", format="sparsify")).sites == MLP


def beside(place: Path, **entry: Any) -> Path:
    """The folder with our own file edited; None takes an entry away."""
    file = place / "jaxinterp_sites.json"
    fields = json.loads(file.read_text()) | entry
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return place


def test_moments_of_the_target_are_read_or_refused(tmp_path: Path) -> None:
    """A number is a number, however JSON spells it."""
    place = write(dictionary(ReLU(), MLP), tmp_path / "it", format="saelens")
    found = read(beside(place, target_mean=[1] * D, target_variance=2))
    np.testing.assert_array_equal(found.target_mean, np.ones(D))
    assert float(found.target_variance) == 2
    for entry, message in (
        ({"target_variance": None}, "target_variance=None should be a number"),
        ({"target_variance": "2"}, "target_variance='2' should be a number"),
        ({"target_variance": True}, "target_variance=True should be a number"),
        ({"target_variance": 1e300}, "target_variance=1e.300 should be a number"),
        ({"target_variance": 2, "target_mean": None}, "target_mean should be 12 numbers, beside target_variance"),
        ({"target_mean": [1.0]}, "target_mean should be 12 numbers"),
        ({"target_mean": [float("nan")] * D}, "target_mean should be 12 numbers"),
    ):
        with pytest.raises(UserError, match=message):
            read(beside(place, **entry))
    assert np.isnan(read(beside(place, target_mean=None, target_variance=None)).target_variance)


def test_sites_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    place = write(dictionary(TopK(4), MLP), tmp_path / "layers.3.mlp", format="sparsify")
    assert read(place).sites == MLP
    with pytest.raises(UserError, match=r"reads='blocks/3/mlp/in'.* and the folder's name 'layers.4.mlp' contradict"):
        read(place.rename(tmp_path / "layers.4.mlp"))
    (tmp_path / "layers.4.mlp" / "jaxinterp_sites.json").unlink()
    assert read(tmp_path / "layers.4.mlp").sites == Sites("blocks/4/mlp/in", "blocks/4/mlp/out")
    bare = (tmp_path / "layers.4.mlp").rename(tmp_path / "run7")
    with pytest.raises(UserError, match=r"the folder's name 'run7' is not a known module .* pass site="):
        read(bare)
    assert read(bare, site="blocks/2/mlp").sites == Sites("blocks/2/mlp/in", "blocks/2/mlp/out")


def test_added_and_out_are_told_apart(tmp_path: Path) -> None:
    """Without our own file too, once the model's name is there: `mlp.hook_out` is before the norm behind the MLP."""
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
        assert read(place).sites.writes == f"blocks/3/mlp/{port}"


@pytest.mark.parametrize("known", [True, False])
def test_what_attention_returns_is_read_back_by_either_name(known: bool, tmp_path: Path) -> None:
    place = write(dictionary(ReLU(), at("blocks/3/attn/out")), tmp_path, format="saelens")
    if not known:
        (place / "jaxinterp_sites.json").unlink()
    for hook in ("attn.hook_out", "hook_attn_out"):
        config = (place / "cfg.json").read_text()
        (place / "cfg.json").write_text(config.replace("attn.hook_out", hook))
        assert f'"blocks.3.{hook}"' in (place / "cfg.json").read_text()
        assert read(place).sites == at("blocks/3/attn/out")
