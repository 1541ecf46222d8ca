"""Files of public formats give the codes and outputs of the peers' own loaders. Made by make_public_goldens.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import ReLU, TopK
from jaxinterp.decompositions.cross_layer import CrossLayer, PerLayer
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.decompositions.group_max import GroupMax
from jaxinterp.decompositions.per_token import PerToken, per_token
from jaxinterp.decompositions.saved import load_decomposition, save
from jaxinterp.interchange import decoder_rows, read, write
from jaxinterp.interchange.llama_scope import read_llama_scope
from jaxinterp.models.tiny import tiny_subject
from tests.interchange.written import MLP, TRACER, at, codes_and_outputs, cross_layer, dictionary

GOLDENS = Path(__file__).parent / "goldens_public"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/case.json"))


def opened(case: str) -> tuple[Any, dict[str, np.ndarray]]:
    """What `read` makes of a golden, and what the peer made of it."""
    how = json.loads((GOLDENS / case / "case.json").read_text())
    path = GOLDENS / case / how.pop("path")
    with np.load(GOLDENS / case / "expected.npz", allow_pickle=False) as expected:
        return read(path, **how), dict(expected)


def test_every_format_is_there() -> None:
    kinds = {case.split("-")[0] for case in CASES}
    assert kinds == {"gs2", "llama", "qwen", "hook", "goodfire", "deepseek", "saelens", "sparsify", "tracer"}
    assert len(CASES) == 18
    assert sum(path.stat().st_size for path in GOLDENS.rglob("*") if path.is_file()) < 350_000


@pytest.mark.parametrize("case", CASES)
def test_codes_and_outputs_are_theirs(case: str) -> None:
    dictionary, expected = opened(case)
    if isinstance(dictionary, CrossLayer):
        x = tuple(jnp.asarray(rows) for rows in expected["x"])
        codes, outputs = [each.dense() for each in dictionary.encode(x).layers], dictionary(x)
    else:
        x = jnp.asarray(expected["x"])
        codes, outputs = dictionary.encode(x).dense(), dictionary(x)
    np.testing.assert_allclose(np.asarray(codes), expected["z"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(outputs), expected["y"], rtol=0, atol=1e-5)
    assert 0.1 < np.mean(expected["z"] != 0) < 0.8 and np.ptp(expected["y"]) > 1, "the golden would show nothing"


@pytest.mark.parametrize(
    ("case", "reads", "writes", "activation"),
    [
        ("gs2-res", "blocks/13/resid/post", "blocks/13/resid/post", JumpReLU),
        ("gs2-mlp", "blocks/13/mlp/added", "blocks/13/mlp/added", JumpReLU),
        ("gs2-att", "blocks/13/attn/z", "blocks/13/attn/z", JumpReLU),
        ("gs2-transcoder", "blocks/13/mlp/in", "blocks/13/mlp/added", JumpReLU),
        ("gs2-affine", "blocks/13/mlp/in", "blocks/13/mlp/added", JumpReLU),
        ("llama-scope", "blocks/16/mlp/out", "blocks/16/mlp/out", JumpReLU),
        ("llama-scope-r1", "blocks/15/resid/post", "blocks/15/resid/post", JumpReLU),
        ("qwen-scope", "blocks/14/resid/post", "blocks/14/resid/post", TopK),
        ("hook-z", "blocks/6/attn/z", "blocks/6/attn/z", ReLU),
        ("tracer-relu", "blocks/3/mlp/in", "blocks/3/mlp/out", ReLU),
        ("tracer-jump-skip", "blocks/3/mlp/in", "blocks/3/mlp/out", JumpReLU),
        ("sparsify-groupmax", "blocks/1/mlp/in", "blocks/1/mlp/out", GroupMax),
    ],
)
def test_sites_and_activations_are_what_the_files_say(case: str, reads: str, writes: str, activation: type) -> None:
    dictionary, _ = opened(case)
    assert dictionary.sites == Sites(reads, writes) and type(dictionary.activation) is activation


@pytest.mark.parametrize("case", ["saelens-layer_norm", "sparsify-groupmax"])
def test_what_is_new_is_saved_and_loaded(case: str, tmp_path: Path) -> None:
    dictionary, expected = opened(case)
    again = load_decomposition(save(dictionary, tmp_path / "it"))
    assert type(again) is type(dictionary)
    x = jnp.asarray(expected["x"])
    np.testing.assert_array_equal(again(x), dictionary(x))


def test_the_scale_of_each_token_matters() -> None:
    dictionary, expected = opened("saelens-layer_norm")
    assert isinstance(dictionary, PerToken)
    x = jnp.asarray(expected["x"])
    assert np.abs(np.asarray(dictionary.inner(x)) - expected["y"]).max() > 0.1
    n, scale, shift = per_token(x, "layer_norm")
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(scale[:, 0], wide.std(axis=-1, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(n * (scale + 1e-5) + shift, x, rtol=1e-5, atol=1e-5)


def test_write_vectors_that_are_not_unit_decide_by_their_length(tmp_path: Path) -> None:
    """Llama Scope: active where a |D| s_in / s_out > threshold in the data's units, by the formula in NumPy."""
    folder = tmp_path / "L16M"
    shutil.copytree(GOLDENS / "llama-scope" / "Llama3_1-8B-Base-LXM-8x" / "Llama3_1-8B-Base-L16M-8x", folder)
    path = folder / "checkpoints" / "final.safetensors"
    arrays = load_file(path)
    lengths = np.linspace(0.5, 2, arrays["encoder.bias"].size).astype(np.float32)
    arrays["decoder.weight"] = np.ascontiguousarray(arrays["decoder.weight"] * lengths)
    save_file(arrays, path)
    fields = json.loads((folder / "hyperparams.json").read_text())
    fields |= {"dataset_average_activation_norm": {"in": 2.5, "out": 4.0}, "apply_decoder_bias_to_pre_encoder": True}
    (folder / "hyperparams.json").write_text(json.dumps(fields))
    x = np.random.default_rng(3).normal(size=(7, 12))
    into, out = np.sqrt(12) / 2.5, np.sqrt(12) / 4.0
    a = (into * x - arrays["decoder.bias"]) @ arrays["encoder.weight"].T + arrays["encoder.bias"]
    active = a * np.linalg.norm(arrays["decoder.weight"], axis=0) / out > fields["jump_relu_threshold"]
    y = (a * active @ arrays["decoder.weight"].T + arrays["decoder.bias"]) / out
    dictionary = read(folder)
    codes = dictionary.encode(jnp.asarray(x, jnp.float32)).dense()
    np.testing.assert_array_equal(np.asarray(codes) != 0, active)
    np.testing.assert_allclose(dictionary(jnp.asarray(x, jnp.float32)), y, atol=1e-4)
    by_value = a / into > fields["jump_relu_threshold"]
    assert not np.array_equal(by_value, active)


def test_llama_scope_without_norms_wants_the_scale() -> None:
    how = json.loads((GOLDENS / "llama-scope-r1" / "case.json").read_text())
    path = GOLDENS / "llama-scope-r1" / how["path"]
    assert read_llama_scope(path).factor is None
    with pytest.raises(UserError, match="pass scaling_factor="):
        read(path)


def test_older_files_of_circuit_tracer_have_one_column_a_feature(tmp_path: Path) -> None:
    source = GOLDENS / "tracer-relu" / "qwen3-4b-transcoders"
    arrays = load_file(source / "layer_3.safetensors")
    arrays["W_dec"] = np.ascontiguousarray(arrays["W_dec"].T)
    save_file(arrays, tmp_path / "layer_3.safetensors")
    shutil.copy(source / "config.yaml", tmp_path)
    x = jnp.asarray(np.load(GOLDENS / "tracer-relu" / "expected.npz")["x"])
    np.testing.assert_array_equal(read(tmp_path / "layer_3.safetensors")(x), read(source / "layer_3.safetensors")(x))


def test_all_layers_of_a_folder(tmp_path: Path) -> None:
    source = GOLDENS / "tracer-relu" / "qwen3-4b-transcoders"
    for layer in range(3):
        shutil.copy(source / "layer_3.safetensors", tmp_path / f"layer_{layer}.safetensors")
    shutil.copy(source / "config.yaml", tmp_path)
    layers = read(tmp_path)
    assert isinstance(layers, PerLayer)
    assert layers.sites == Sites(*(tuple(f"blocks/{n}/mlp/{port}" for n in range(3)) for port in ("in", "out")))
    (tmp_path / "layer_1.safetensors").unlink()
    with pytest.raises(UserError, match=r"layers \[1\] are missing"):
        read(tmp_path)


def test_one_layer_of_a_cross_layer_transcoder_has_its_codes() -> None:
    folder = GOLDENS / "tracer-clt-jump" / "clt"
    expected = np.load(GOLDENS / "tracer-clt-jump" / "expected.npz")
    with pytest.warns(UserWarning, match="summed over the layers"):
        one = read(folder / "W_enc_1.safetensors")
    np.testing.assert_allclose(one.encode(jnp.asarray(expected["x"][1])).dense(), expected["z"][1], atol=1e-5)
    rows = decoder_rows(folder, 1, np.array([5, 2]))
    np.testing.assert_array_equal(rows, load_file(folder / "W_dec_1.safetensors")["W_dec_1"][[5, 2]])
    with pytest.raises(UserError, match="24 features; 24 or another"):
        decoder_rows(folder, 1, np.array([24]))


def test_layers_of_another_width_are_refused(tmp_path: Path) -> None:
    """A bias of one number would be added to every dimension, unseen."""
    source = GOLDENS / "tracer-clt-jump" / "clt"
    for name, width, words in (
        ("W_enc_1", -1, "different models"),
        ("b_dec_1", 1, "W_dec_1"),
        ("b_dec_1", -1, "W_dec_1"),
    ):
        folder = tmp_path / f"{name}{width}"
        shutil.copytree(source, folder)
        held = load_file(folder / "W_enc_1.safetensors")
        held[name] = np.ascontiguousarray(held[name][..., :width])
        save_file(held, folder / "W_enc_1.safetensors")
        with pytest.raises(UserError, match=words):
            read(folder)
        if name == "b_dec_1":
            with pytest.raises(UserError, match="W_dec_1"):
                read(folder / "W_enc_1.safetensors")


def test_a_threshold_that_is_missing_is_refused(tmp_path: Path) -> None:
    """It would be read as 0."""
    how = json.loads((GOLDENS / "llama-scope-r1" / "case.json").read_text())
    shutil.copytree(GOLDENS / "llama-scope-r1" / how["path"], tmp_path / "r1")
    held = load_file(tmp_path / "r1" / "sae_weights.safetensors")
    del held["log_jumprelu_threshold"]
    save_file(held, tmp_path / "r1" / "sae_weights.safetensors")
    with pytest.raises(UserError, match="neither log_jumprelu_threshold nor jump_relu_threshold"):
        read_llama_scope(tmp_path / "r1")


def test_gemma_scope_2_cross_layer(tmp_path: Path) -> None:
    """w_dec has all layers, 0 before the one that is read; a feature that writes backwards is refused."""
    rng, layers = np.random.default_rng(0), 3
    held = []
    for layer in range(layers):
        arrays = {
            "w_enc": rng.normal(size=(6, 8)),
            "w_dec": rng.normal(size=(8, layers, 6)),
            "b_enc": rng.normal(size=8),
        }
        arrays |= {"b_dec": rng.normal(size=6), "threshold": abs(rng.normal(size=8))}
        arrays["w_dec"][:, :layer] = 0
        held.append({name: array.astype(np.float32) for name, array in arrays.items()})
        save_file(held[-1], tmp_path / f"params_layer_{layer}.safetensors")
    cross = read(tmp_path)
    assert isinstance(cross, CrossLayer) and cross.sites.writes == tuple(f"blocks/{n}/mlp/added" for n in range(layers))
    x = rng.normal(size=(layers, 4, 6)).astype(np.float32)
    meant = np.zeros_like(x)
    for layer, arrays in enumerate(held):
        a = x[layer] @ arrays["w_enc"] + arrays["b_enc"]
        meant += np.einsum("tf,fld->ltd", a * (a > arrays["threshold"]), arrays["w_dec"])
        meant[layer] += arrays["b_dec"]
    np.testing.assert_allclose(np.stack(cross(tuple(map(jnp.asarray, x)))), meant, atol=1e-4)
    with pytest.raises(UserError, match="read its folder"):
        read(tmp_path / "params_layer_1.safetensors")
    held[1]["w_dec"][0, 0] = 1
    save_file(held[1], tmp_path / "params_layer_1.safetensors")
    with pytest.raises(UserError, match="write to layers before it"):
        read(tmp_path)


def test_one_head_of_several(tmp_path: Path) -> None:
    """A dictionary of one head's z reads and writes that head, and lets the others pass."""
    subject = tiny_subject()
    config = subject.model.config
    folder = tmp_path / "it"
    shutil.copytree(Path(__file__).parent / "goldens" / "saelens-standard", folder)
    size, features = config.head_dim, 10
    rng = np.random.default_rng(0)
    arrays = {"W_enc": rng.normal(size=(size, features)), "W_dec": rng.normal(size=(features, size))}
    arrays |= {"b_enc": rng.normal(size=features), "b_dec": rng.normal(size=size)}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    save_file(arrays, folder / "sae_weights.safetensors")
    fields = json.loads((folder / "cfg.json").read_text())
    fields |= {"d_in": size, "d_sae": features}
    fields["metadata"] |= {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 1}
    (folder / "cfg.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="pass subject="):
        read(folder)
    dictionary = read(folder, subject=subject)
    x = rng.normal(size=(5, config.heads * size)).astype(np.float32)
    own = slice(size, 2 * size)
    z = np.maximum((x[:, own] - arrays["b_dec"]) @ arrays["W_enc"] + arrays["b_enc"], 0)
    meant = x.copy()
    meant[:, own] = z @ arrays["W_dec"] + arrays["b_dec"]
    np.testing.assert_allclose(dictionary.encode(jnp.asarray(x)).dense(), z, atol=1e-4)
    np.testing.assert_allclose(dictionary(jnp.asarray(x)), meant, atol=1e-4)


def test_what_is_not_a_dictionary_is_refused_with_the_reason(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent / "goldens" / "saelens-standard", tmp_path / "it")
    fields = json.loads((tmp_path / "it" / "cfg.json").read_text())
    for name, reason in [
        ("temporal", "codes depend on the tokens before"),
        ("matching_pursuit", "one after the other"),
    ]:
        (tmp_path / "it" / "cfg.json").write_text(json.dumps(fields | {"architecture": name}))
        with pytest.raises(UserError, match=reason):
            read(tmp_path / "it")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "conf.yaml").write_text("sae: {}")
    with pytest.raises(UserError, match="temporal autoencoder"):
        read(tmp_path / "t")


def test_fields_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """What mutated files showed: a number for the norms, a list for the architecture."""
    source = GOLDENS / "llama-scope" / "Llama3_1-8B-Base-LXM-8x" / "Llama3_1-8B-Base-L16M-8x"
    shutil.copytree(source, tmp_path / "L16M")
    shutil.copytree(Path(__file__).parent / "goldens" / "saelens-standard", tmp_path / "it")
    for path, change, message in [
        (tmp_path / "L16M" / "hyperparams.json", {"dataset_average_activation_norm": 2.5}, "should be an object"),
        (tmp_path / "it" / "cfg.json", {"architecture": ["standard"]}, "architecture=a list is not supported"),
    ]:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UserError, match=message):
            read(path.parent)


def test_qwen_scope_without_its_name_is_refused(tmp_path: Path) -> None:
    (path,) = (GOLDENS / "qwen-scope").rglob("*.pt")
    shutil.copy(path, tmp_path)
    with pytest.raises(UserError, match="in the repository's name only"):
        read(tmp_path / path.name)


@pytest.mark.parametrize("name", TRACER)
@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_written_for_circuit_tracer_is_read_back(name: str, scaled: bool, tmp_path: Path) -> None:
    made = TRACER[name](scaled=scaled)
    found = read(write(made, tmp_path / "it", format="circuit_tracer"))
    found = found.parts[0] if isinstance(found, PerLayer) else found
    for ours, theirs in zip(codes_and_outputs(made), codes_and_outputs(found), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert found.sites == made.sites


def test_what_circuit_tracer_cannot_hold_is_refused(tmp_path: Path) -> None:
    for made, message in [
        (dictionary(TopK(4), MLP), "activation=TopK: circuit-tracer's files have ReLU and JumpReLU only"),
        (dictionary(ReLU(), at("blocks/1/mlp/out")), "circuit-tracer has transcoders only"),
        (cross_layer([ReLU(), TopK(3)]), "activation=TopK"),
    ]:
        with pytest.raises(UserError, match=message):
            write(made, tmp_path / "it", format="circuit_tracer")
        assert not (tmp_path / "it").exists(), "nothing was begun"
