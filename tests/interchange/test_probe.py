"""A dictionary is tried on its subject: the true one passes, one that was read wrongly is refused by name.

The subject's MLPs are planted: the neurons of each *are* the ReLU transcoder that explains it, so that every file here
has a known right reading.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import ReLU, TopK
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.interchange import probe, read, write
from jaxinterp.interchange.contents import Contents, behind_gain, build
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.run import run
from jaxinterp.models.tiny import TINY, planted_transformer, unit_rows

D = 32
CONFIG = replace(
    TINY,
    d_model=D,
    d_mlp=D,
    layers=2,
    heads=2,
    kv_heads=2,
    head_dim=8,
    rotary_dimensions=8,
    norm="layer",
    norm_bias=True,
)
MLP = Sites("blocks/1/mlp/in", "blocks/1/mlp/out")
HIDDEN = Sites("blocks/1/mlp/hidden", "blocks/1/mlp/hidden")


@pytest.fixture(scope="module")
def subject() -> Subject:
    """Two planted layers whose norms have gains and biases far from 1 and 0."""
    model = planted_transformer(jax.random.key(0), CONFIG)
    gains = [jnp.exp(0.5 * jax.random.normal(jax.random.key(n), (D,))) for n in range(2)]
    biases = [0.3 * jax.random.normal(jax.random.key(5 + n), (D,)) for n in range(2)]
    norms = lambda model: [getattr(block.mlp_norm, name) for name in ("weight", "bias") for block in model.blocks]
    return Subject(eqx.tree_at(norms, model, [*gains, *biases]), None, "planted")


@pytest.fixture(scope="module")
def text() -> grain.MapDataset:
    """64 windows of 32 random tokens."""
    tokens = np.random.default_rng(0).integers(0, 256, (64, 32), np.int32)
    weight = np.ones(32, np.float32)
    weight[0] = 0
    rows = [{"tokens": row, "weight": weight, "document": np.full(32, i, np.int32)} for i, row in enumerate(tokens)]
    return grain.MapDataset.source(rows)


def dictionary(encoder: Any, bias: Any, decoder: Any, sites: Sites, activation: Any = None, **more: Any) -> Dictionary:
    arrays = [np.asarray(array, np.float32) for array in (encoder, bias, decoder, np.zeros(np.shape(decoder)[1]))]
    return build(Contents(*arrays, activation or ReLU(), False, sites.reads != sites.writes, **more), sites)


@pytest.fixture(scope="module")
def transcoder(subject: Subject) -> Dictionary:
    """The planted MLP itself: 32 features of 32 dimensions."""
    mlp: Any = subject.model.blocks[1].mlp  # type: ignore[attr-defined]
    return dictionary(mlp.up_proj.weight.T, mlp.up_proj.bias, mlp.down_proj.weight, MLP)


def distracted(size: float) -> Dictionary:
    """Explains nine tenths of the neurons' activations by the largest codes; the others are noise of some size."""
    noise = np.asarray(unit_rows(jax.random.key(9), 96, D))
    encoder, decoder = np.concatenate([np.eye(D), 0.2 * noise]), np.concatenate([0.9 * np.eye(D), size * noise[::-1]])
    return dictionary(encoder, np.zeros(128), decoder, HIDDEN, TopK(4))


def refused(message: str, path: Path, subject: Subject, text: grain.MapDataset, **options: Any) -> None:
    with pytest.raises(UserError, match=message):
        read(path, subject=subject, tokens=text, **options)
    read(path, subject=subject, **options)  # nothing else is wrong with it


def test_the_true_dictionary_passes(subject: Subject, text: Any, transcoder: Dictionary, tmp_path: Path) -> None:
    found = read(write(transcoder, tmp_path, format="saelens"), subject=subject, tokens=text)
    np.testing.assert_array_equal(found.encoder, transcoder.encoder)
    assert np.all(np.isfinite(found.target_mean)) and found.target_variance > 0, "the target was measured"
    measured = probe(found, subject, text)
    assert measured.fvu < 1e-10 and measured.l0 > 1 and measured.tokens == 64 * 31


def test_relu_taken_for_topk(subject: Subject, text: Any, transcoder: Dictionary, tmp_path: Path) -> None:
    path = write(replace(transcoder, activation=TopK(1)), tmp_path, format="sparsify")
    refused("with a ReLU: the activation looks like ReLU, not TopK", path, subject, text)


@pytest.mark.parametrize("size", [2.0, 0.3])
def test_topk_taken_for_relu(size: float, subject: Subject, text: Any, tmp_path: Path) -> None:
    """The codes that ReLU adds do harm, or next to nothing."""
    path = write(distracted(size), tmp_path, format="saelens")
    assert probe(read(path, subject=subject, tokens=text), subject, text).fvu < 0.3
    config = json.loads((path / "cfg.json").read_text())
    del config["k"], config["rescale_acts_by_decoder_norm"]
    (path / "cfg.json").write_text(json.dumps(config | {"architecture": "standard"}))
    refused(r"with the \d largest codes: the activation looks like TopK, not ReLU", path, subject, text)


def test_a_logarithm_taken_for_a_threshold(subject: Subject, text: Any, tmp_path: Path) -> None:
    jump = JumpReLU(jnp.full(128, jnp.log(0.25)), "raw", 0.1)
    path = write(replace(distracted(2.0), activation=jump), tmp_path, format="saelens")
    refused(r"with exp\(threshold\): threshold looks like its logarithm", path, subject, text)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_transposed_weight_is_named(
    name: str, subject: Subject, text: Any, transcoder: Dictionary, tmp_path: Path
) -> None:
    """As many features as dimensions: no shape tells."""
    turned = replace(transcoder, **{name: getattr(transcoder, name).T})
    refused(f"with the {name} transposed: it looks tr", write(turned, tmp_path, format="saelens"), subject, text)


def test_a_wrong_site_is_named(subject: Subject, text: Any, transcoder: Dictionary, tmp_path: Path) -> None:
    path = write(transcoder, tmp_path, format="saelens")
    right = "0.00 at 'blocks/1/mlp/in' -> 'blocks/1/mlp/out': the site looks wrong"
    refused(right, path, subject, text, site="blocks/0/mlp")
    refused(right, path, subject, text, site=Sites("blocks/1/resid/mid", "blocks/1/mlp/out"))


def test_a_missing_scale_is_named(subject: Subject, text: Any, transcoder: Dictionary, tmp_path: Path) -> None:
    scaled = replace(transcoder, encoder=transcoder.encoder / 8, decoder=transcoder.decoder * 8)
    message = "with inputs times 8 and outputs times 8: scales are missing"
    refused(message, write(scaled, tmp_path / "a", format="saelens"), subject, text)

    # relu(16 x - 1/2) of each neuron: x = y / 16 + what is lost below the threshold
    sae = dictionary(np.eye(D), np.full(D, -0.5), np.eye(D), HIDDEN)
    path = write(sae, tmp_path / "b", format="saelens")
    refused(r"a scale is missing, pass scaling_factor=\d", path, subject, text)
    found = read(path, subject=subject, tokens=text, scaling_factor=16.0)
    assert probe(found, subject, text).fvu < 0.05


def test_noise_is_refused(subject: Subject, text: Any, tmp_path: Path) -> None:
    rows = 3 * np.asarray(unit_rows(jax.random.key(1), 48, D))
    path = write(dictionary(rows, np.ones(48), rows[::-1], MLP), tmp_path, format="saelens")
    refused("worse than the mean, and so is every other activation, orientation, scale and site", path, subject, text)


def test_widths_and_names_are_checked_without_text(subject: Subject, tmp_path: Path) -> None:
    path = write(distracted(1.0), tmp_path, format="saelens")
    with pytest.raises(UserError, match="no site 'blocks/7/mlp/out' in this model"):
        read(path, subject=subject, site="blocks/7/mlp")
    with pytest.raises(UserError, match="d_in=32, but 'blocks/1/attn/z' of this model has 16: wrong site or model"):
        read(path, subject=subject, site="blocks/1/attn/z")


def test_what_was_trained_before_the_gain_is_taken_behind_it(
    subject: Subject, text: Any, transcoder: Dictionary, tmp_path: Path
) -> None:
    """SAELens's `ln2.hook_normalized`: the transcoder for n, where the MLP reads gain n + bias."""
    norm: Any = subject.model.blocks[1].mlp_norm  # type: ignore[attr-defined]
    before = replace(
        transcoder,
        encoder=transcoder.encoder * norm.weight,
        encoder_bias=transcoder.encoder_bias + transcoder.encoder @ norm.bias,
    )
    path = write(before, tmp_path, format="saelens")
    refused("FVU=.*", path, subject, text)
    (path / "jaxinterp_sites.json").unlink()
    config = (path / "cfg.json").read_text()
    (path / "cfg.json").write_text(config.replace("mlp.hook_in", "ln2.hook_normalized"))
    with pytest.raises(UserError, match=r"hook_name='blocks\.1\.ln2\.hook_normalized'.* pass subject="):
        read(path)
    found = read(path, subject=subject, tokens=text)
    np.testing.assert_allclose(found.encoder, transcoder.encoder, rtol=1e-5)
    assert found.sites == MLP and probe(found, subject, text).fvu < 1e-8


def test_gemma_scope_transcoders_are_taken_behind_the_gain(tmp_path: Path) -> None:
    """Gemma stores gains less 1, and has a norm behind its MLP."""
    gemma = replace(CONFIG, norm="rms", norm_bias=False, norm_offset=1.0, post_norms=True)
    model = planted_transformer(jax.random.key(0), gemma)
    gain = jnp.linspace(-0.5, 0.5, D)
    model = eqx.tree_at(lambda model: model.blocks[1].mlp_norm.weight, model, gain)
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_1" / "width_16k" / "average_l0_5"
    folder.mkdir(parents=True)
    rows = np.asarray(unit_rows(jax.random.key(1), 48, D))
    vectors = {"b_enc": np.ones(48), "b_dec": np.zeros(D), "threshold": np.ones(48)}
    np.savez(folder / "params.npz", W_enc=rows.T, W_dec=rows, **{k: v.astype(np.float32) for k, v in vectors.items()})
    found = read(folder, subject=Subject(model, None, "gemma"))
    assert found.sites == Sites("blocks/1/mlp/in", "blocks/1/mlp/added")
    np.testing.assert_allclose(found.encoder, rows / (1 + gain), rtol=1e-6)
    np.testing.assert_array_equal(found.decoder, rows)


def test_a_model_without_the_norm_of_a_hook_is_named(tmp_path: Path) -> None:
    """OLMo 2 and BERT have their norms behind their sublayers."""
    model = planted_transformer(jax.random.key(0), replace(CONFIG, pre_norms=False, post_norms=True))
    rows = np.asarray(unit_rows(jax.random.key(1), 48, D))
    path = write(dictionary(rows, np.ones(48), rows, MLP), tmp_path, format="saelens")
    (path / "jaxinterp_sites.json").unlink()
    config = (path / "cfg.json").read_text()
    (path / "cfg.json").write_text(config.replace("mlp.hook_in", "ln2.hook_normalized"))
    with pytest.raises(UserError, match=r"ln2\.hook_normalized.* has no norm before the sublayer blocks/1/mlp"):
        read(path, subject=Subject(model, None, "olmo"))


@pytest.mark.parametrize("subtracts", [False, True])
@pytest.mark.parametrize("kind", ["autoencoder", "scaled autoencoder", "transcoder", "skip"])
def test_behind_gain_changes_nothing(kind: str, subtracts: bool) -> None:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    gain, bias, n = np.exp(0.3 * draw(6)), draw(6), draw(5, 6)
    same, factor = kind.endswith("autoencoder"), 3.0 if kind.startswith("scaled") else 1.0
    sites = Sites("x", "x" if same else "y")
    skip = draw(6, 6) if kind == "skip" else None
    contents = Contents(
        draw(9, 6), draw(9), draw(9, 6), draw(6), ReLU(), subtracts and same, not same, skip, factor=factor
    )
    before, after = build(contents, sites), build(behind_gain(contents, gain, bias), sites)
    x, n = jnp.asarray(gain * n + bias), jnp.asarray(n)
    np.testing.assert_allclose(after.encode(x).dense(), before.encode(n).dense(), atol=1e-5)
    expected = np.asarray(before(n))
    np.testing.assert_allclose(after(x), gain * expected + bias if same else expected, atol=1e-4)
    with pytest.raises(UserError, match="gains of 0"):
        behind_gain(contents, 0 * gain, bias)


def test_a_probe_changes_nothing_that_the_file_says(
    subject: Subject, text: Any, transcoder: Dictionary, tmp_path: Path
) -> None:
    """The stored training mean is not replaced by a held-out mean."""
    mean, variance = jnp.linspace(-1, 1, D), jnp.asarray(3.5)
    path = write(replace(transcoder, target_mean=mean, target_variance=variance), tmp_path, format="saelens")
    found = read(path, subject=subject, tokens=text)
    np.testing.assert_array_equal(found.target_mean, mean)
    assert found.target_variance == variance
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(read(path, subject=subject)), strict=True):
        np.testing.assert_array_equal(one, other)


def trained_at(site: str, subject: Subject, text: Any) -> Dictionary:
    """A linear autoencoder of rank 28 of 32 at a site: positive and negative parts of its components."""
    tokens = jnp.asarray(np.stack([text[index]["tokens"] for index in range(32)]))
    rows = np.asarray(run(subject.model, tokens)[site])[:, 1:].reshape(-1, D)
    mean = rows.mean(axis=0)
    vectors = np.linalg.svd(rows - mean, full_matrices=False)[2][:28]
    both = np.concatenate([vectors, -vectors])
    arrays = [array.astype(np.float32) for array in (both, np.zeros(56), both, mean)]
    return build(Contents(*arrays, ReLU(), True, False), Sites(site, site))


def test_a_neighbouring_layer_that_explains_more_is_told(subject: Subject, text: Any, tmp_path: Path) -> None:
    path = write(trained_at("blocks/0/resid/post", subject, text), tmp_path, format="saelens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(path, subject=subject, tokens=text)  # at its own site: not a word
    (path / "jaxinterp_sites.json").unlink()
    with pytest.warns(UserWarning, match=r"FVU=.* at 'blocks/0/resid/post': the site looks wrong, pass site="):
        found = read(path, subject=subject, tokens=text, site="blocks/1/resid/post", force=True)
    assert found.sites.reads == "blocks/1/resid/post", "it is read as it was asked for"


def test_a_flipped_subtraction_of_the_bias_is_told(subject: Subject, text: Any, tmp_path: Path) -> None:
    path = write(trained_at("blocks/0/resid/post", subject, text), tmp_path, format="saelens")
    config = json.loads((path / "cfg.json").read_text())
    assert config["apply_b_dec_to_input"]
    (path / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": False}))
    with pytest.warns(UserWarning, match="bias subtracted from the input"):
        found = read(path, subject=subject, tokens=text, force=True)
    assert not jnp.any(found.input_mean), "it is read as the file says"


def test_a_refusal_names_the_way_to_override_it(subject: Subject, text: Any, tmp_path: Path) -> None:
    path = write(distracted(2.0), tmp_path, format="saelens")
    config = json.loads((path / "cfg.json").read_text())
    del config["k"], config["rescale_acts_by_decoder_norm"]
    (path / "cfg.json").write_text(json.dumps(config | {"architecture": "standard"}))
    with pytest.raises(UserError, match=r"looks like TopK, not ReLU\. Pass force=True to read it as the file says"):
        read(path, subject=subject, tokens=text)
    with pytest.warns(UserWarning, match=r"looks like TopK, not ReLU\. It is read as the file says"):
        assert isinstance(read(path, subject=subject, tokens=text, force=True).activation, ReLU)


def test_a_scale_that_no_file_has_is_measured_on_the_text(
    subject: Subject, text: grain.MapDataset, tmp_path: Path
) -> None:
    """expected_average_only_in without its factor: sqrt(d) / mean length on the text, told in a warning."""
    site = "blocks/1/resid/post"
    rows = np.concatenate([np.asarray(window["tokens"])[None] for window in (text[n] for n in range(64))])
    x = np.asarray(run(subject.model, jnp.asarray(rows))[site])[:, 1:].reshape(-1, D)
    factor = float(np.sqrt(D) / np.mean(np.linalg.norm(x, axis=1)))
    eye = np.eye(D, dtype=np.float32)
    made = dictionary(np.concatenate([eye, -eye]), np.zeros(2 * D), np.concatenate([eye, -eye]), Sites(site, site))
    folder = write(made, tmp_path / "it", format="saelens")
    fields = json.loads((folder / "cfg.json").read_text()) | {"normalize_activations": "expected_average_only_in"}
    (folder / "cfg.json").write_text(json.dumps(fields))
    with pytest.warns(UserWarning, match=r"sqrt\(d\) / mean length on the given tokens is"):
        found = read(folder, subject=subject, tokens=text)
    assert float(found.input_scale) == pytest.approx(1 / factor, rel=1e-4)
    with pytest.raises(UserError, match="the scale is missing"):
        read(folder, subject=subject)
