"""SAELens folders as training writes them, and files that leave out what a reader must know."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.interchange import read, write
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.transformer import TransformerConfig, initialise

D, F = 6, 10
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, D)).astype(np.float32) + 0.7
ARRAYS = {
    "W_enc": RNG.normal(size=(D, F)),
    "W_dec": RNG.normal(size=(F, D)) * np.linspace(0.3, 3, F)[:, None],
    "b_enc": RNG.normal(size=F),
    "b_dec": RNG.normal(size=D),
}
ARRAYS = {name: array.astype(np.float32) for name, array in ARRAYS.items()}
COMMON = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True}
COMMON |= {"normalize_activations": "none", "reshape_activations": "none"}
TOPK = {"k": 3, "aux_loss_coefficient": 1.0, "use_sparse_activations": True, "topk_threshold_lr": 0.01}


def folder(where: Path, config: dict[str, Any], *, hook: str = "blocks.0.hook_resid_post", **arrays: Any) -> Path:
    where.mkdir(parents=True, exist_ok=True)
    save_file(ARRAYS | arrays, where / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.18.0", "hook_name": hook, "model_name": "gpt2"}
    (where / "cfg.json").write_text(json.dumps(COMMON | {"metadata": metadata} | config))
    return where


def theirs(threshold: float, *, rescaled: bool, x: np.ndarray = X) -> tuple[np.ndarray, np.ndarray]:
    """Codes and output of a trained BatchTopK: what exceeds the threshold, of a |W_dec rows| if rescaled."""
    norms = np.linalg.norm(ARRAYS["W_dec"], axis=1) if rescaled else np.ones(F)
    a = np.maximum(((x - ARRAYS["b_dec"]) @ ARRAYS["W_enc"] + ARRAYS["b_enc"]) * norms, 0)
    z = a * (a > threshold)
    return z, (z / norms) @ ARRAYS["W_dec"] + ARRAYS["b_dec"]


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
def test_one_threshold_for_all_is_a_jumprelu(tmp_path: Path, name: str, rescaled: bool) -> None:
    own = {"matryoshka_widths": [4, F]} if "matryoshka" in name else {}
    config = {"architecture": name, "rescale_acts_by_decoder_norm": rescaled} | TOPK | own
    found = read(folder(tmp_path, config, topk_threshold=np.array(1.5, np.float32)))
    z, y = theirs(1.5, rescaled=rescaled)
    assert isinstance(found.activation, JumpReLU) and 0.1 < np.mean(z > 0) < 0.9
    np.testing.assert_allclose(found.encode(jnp.asarray(X)).dense(), z, atol=1e-5)
    np.testing.assert_allclose(found(jnp.asarray(X)), y, atol=1e-4)
    # A threshold in the other units would be another dictionary.
    assert not np.allclose(theirs(1.5, rescaled=not rescaled)[1], y, atol=0.1)
    again = read(write(found, tmp_path / "out", format="saelens"))
    np.testing.assert_allclose(again(jnp.asarray(X)), y, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_a_threshold_that_was_never_measured_is_refused(tmp_path: Path, threshold: float) -> None:
    config = {"architecture": "batchtopk", "rescale_acts_by_decoder_norm": True} | TOPK
    with pytest.raises(UserError, match=f"topk_threshold={threshold:g} was never measured"):
        read(folder(tmp_path, config, topk_threshold=np.array(threshold, np.float32)))


def test_the_scale_beside_the_weights_is_read(tmp_path: Path) -> None:
    where = folder(tmp_path, {"architecture": "standard", "normalize_activations": "expected_average_only_in"})
    with pytest.raises(UserError, match="the scale is missing"):
        read(where)
    (where / "activation_scaler.json").write_text(json.dumps({"scaling_factor": None}))
    with pytest.raises(UserError, match="the scale is missing"):
        read(where)
    (where / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.37}))
    a = np.maximum((0.37 * X - ARRAYS["b_dec"]) @ ARRAYS["W_enc"] + ARRAYS["b_enc"], 0)
    expected = (a @ ARRAYS["W_dec"] + ARRAYS["b_dec"]) / 0.37
    np.testing.assert_allclose(read(where)(jnp.asarray(X)), expected, atol=2e-4)
    assert read(where, scaling_factor=0.37).input_scale == read(where).input_scale
    with pytest.raises(UserError, match=r"scaling_factor=0\.4, but the file says 0\.37"):
        read(where, scaling_factor=0.4)
    for wrong in (-1, 0, "0.37", [0.37]):
        (where / "activation_scaler.json").write_text(json.dumps({"scaling_factor": wrong}))
        with pytest.raises(UserError, match="should be a positive number"):
            read(where)


def test_a_scale_that_the_configuration_denies_is_refused(tmp_path: Path) -> None:
    where = folder(tmp_path, {"architecture": "standard"})
    (where / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.37}))
    with pytest.raises(UserError, match="says normalize_activations='none': mend one"):
        read(where)


OLD = {"hook_point": "blocks.0.hook_resid_pre", "hook_point_layer": 0, "lr": 0.1, "metadata": {}}
SITES = ["hook_resid_pre", "hook_resid_mid", "hook_mlp_out", "hook_attn_out"]


def subject(norm: Any) -> Subject:
    import jax

    config = TransformerConfig(
        vocab_size=9, d_model=D, layers=1, heads=1, kv_heads=1, head_dim=6, d_mlp=8, context=8, norm=norm
    )
    return Subject(initialise(config, jax.random.key(0)), None, "small")


@pytest.mark.parametrize("hook", SITES)
def test_a_file_without_a_version_does_not_say_whether_streams_were_centred(tmp_path: Path, hook: str) -> None:
    where = folder(tmp_path, OLD | {"hook_point": f"blocks.0.{hook}", "model_name": "pythia-70m"})
    for options in ({}, {"site": "blocks/0/resid/post"}, {"subject": subject("layer")}):
        with pytest.raises(UserError, match=r"no version.*centred=True to fold.*or centred=False"):
            read(where, **options)
    plain, folded = read(where, centred=False), read(where, centred=True)
    centred = X - X.mean(axis=1, keepdims=True)
    # The stream of the published model in, its own mean left as it is: the same codes and the same error.
    codes = plain.encode(jnp.asarray(centred)).dense()
    np.testing.assert_allclose(folded.encode(jnp.asarray(X)).dense(), codes, atol=1e-5)
    error = plain(jnp.asarray(centred)) - centred
    np.testing.assert_allclose(folded(jnp.asarray(X)) - X, error, atol=1e-5)
    assert not np.allclose(plain.encode(jnp.asarray(X)).dense(), codes, atol=0.1), "what was read before"
    assert read(where, subject=subject("rms")).skip is None, "RMSNorm sees the mean: nothing was taken off"


@pytest.mark.parametrize(
    "said",
    [
        {"model_name": "gemma-2b"},
        {"sae_lens_training_version": "3.4.0"},
        {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": False}}},
        {"hook_point": "blocks.0.attn.hook_z"},
    ],
)
def test_what_says_enough_is_read_as_it_is(tmp_path: Path, said: dict[str, Any]) -> None:
    found = read(folder(tmp_path, OLD | {"model_name": "gpt2-small"} | said))
    assert found.skip is None and np.array_equal(found.encoder, ARRAYS["W_enc"].T)


@pytest.mark.parametrize("version", [None, "6.18.0"])
def test_a_file_that_says_it_is_folded(tmp_path: Path, version: str | None) -> None:
    """`gpt2-small-res-jb` says it, and has no version."""
    options = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    hook = {"hook_name": "blocks.0.hook_resid_pre", "model_name": "gpt2-small", "sae_lens_version": version}
    config = {"metadata": options | hook} | ({"architecture": "standard"} if version else {})
    where = folder(tmp_path, config if version else OLD | {"model_name": "gpt2-small"} | options)
    found = read(where)
    centred = X - X.mean(axis=1, keepdims=True)
    plain = read(where, centred=False)
    np.testing.assert_allclose(
        found.encode(jnp.asarray(X)).dense(), plain.encode(jnp.asarray(centred)).dense(), atol=1e-5
    )
    with pytest.raises(UserError, match="mean of 'blocks/0/attn/z' is never taken off"):
        read(where, site="blocks/0/attn/z", centred=True)
