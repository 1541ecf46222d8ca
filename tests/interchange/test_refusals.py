"""A file that is damaged, or says what cannot be represented, is refused with the name of what is wrong."""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.interchange import read
from jaxinterp.interchange.formats import READERS
from tests.interchange.refused import MEGABYTE, refused

GOLDENS = Path(__file__).parent / "goldens"
SCOPE = "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_5"
HERE = Sites("blocks/1/resid/post", "blocks/1/resid/post")

Edit = Callable[[dict[str, Any]], Any]


def copied(name: str, folder: Path) -> Path:
    """A golden, without what is expected of it."""
    place = folder / name
    shutil.copytree(GOLDENS / name, place, ignore=shutil.ignore_patterns("expected.npz"))
    return place


def edited(name: str, folder: Path, *, config: Edit | None = None, arrays: Edit | None = None) -> Path:
    """A golden with its configuration or its arrays edited."""
    place = copied(name, folder)
    for file in (place / "cfg.json", place / "config.json"):
        if config is not None and file.exists():
            fields = json.loads(file.read_text())
            config(fields)
            file.write_text(json.dumps(fields))
    for weights in place.glob("*.safetensors"):
        if arrays is not None:
            changed = load_file(weights)
            arrays(changed)
            save_file({name: np.ascontiguousarray(array) for name, array in changed.items()}, weights)
    if arrays is not None and (place / "params.npz").exists():
        with np.load(place / "params.npz") as stored:
            changed = dict(stored)
        arrays(changed)
        np.savez(place / "params.npz", **changed)
    return place


def set_to(**fields: Any) -> Edit:
    return lambda config: config.update(fields)


def transposed(name: str) -> Edit:
    return lambda arrays: arrays.update({name: arrays[name].T})


def broken(name: str, value: float = np.nan) -> Edit:
    return lambda arrays: arrays[name].__setitem__((0,) * arrays[name].ndim, value)


def without(*names: str) -> Edit:
    return lambda tree: [tree.pop(name) for name in names]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        # a swapped activation
        ("saelens-topk", set_to(architecture="standard"), "field k=5.* belongs to 'topk': arch.*'standard' looks"),
        ("saelens-jumprelu", set_to(architecture="standard"), "tensor 'threshold'.*of 'jumprelu'.*'standard' looks"),
        ("saelens-standard", set_to(architecture="jumprelu"), "'threshold' is missing.*'standard' or 'topk'"),
        ("saelens-gated", set_to(architecture="standard"), "arrays of 'gated': architecture='standard' looks wrong"),
        ("saelens-skip_transcoder", set_to(architecture="transcoder"), "arrays of 'skip_transcoder'"),
        ("saelens-standard", set_to(architecture="matching_pursuit"), "architecture='matching_pursuit' is not supp"),
        ("saelens-old-topk", set_to(activation_fn_str="tanh-relu"), "activation_fn='tanh-relu' is not supported"),
        ("saelens-old-topk", set_to(activation_fn_kwargs={}), "field k=None should be a positive"),
        ("saelens-old-topk", set_to(activation_fn_kwargs={"k": 5, "signed": True}), "activation_fn_kwargs=.*signed"),
        ("sparsify-sae/layers.1", set_to(activation="tanh"), "activation='tanh' is not supported"),
        ("sparsify-sae/layers.1", set_to(signed=True), "signed=True is not supported: codes below 0"),
        # a missing scale
        ("saelens-standard", set_to(normalize_activations="expected_average_only_in"), "scale is missing.*scaling_f"),
        ("saelens-transcoder", set_to(normalize_activations="layer_norm"), "what it writes has another scale"),
        ("saelens-standard", set_to(normalize_activations="covariance_whitening"), "'covariance_whitening' is not"),
        ("saelens-old-relu", set_to(normalize_activations=True), "the scale is missing"),
        ("saelens-old-relu", set_to(finetuning_scaling_factor=True), "the scale is missing: no tensor 'scaling_f"),
        ("saelens-transcoder", set_to(normalize_activations="expected_average_only_in"), "s='expected_.*be folded"),
        # no configuration of SAELens, or of a version that cannot be told
        ("saelens-old-relu", set_to(activation="topk", k=5), "field activation='topk' is none of SAELens before"),
        ("saelens-old-relu", set_to(k=5), "field k=5 is none of SAELens before"),
        ("saelens-old-relu", without("d_sae"), "neither sae_lens_version nor the fields .*whose activation cannot be"),
        ("saelens-old-relu", without("hook_point"), "neither sae_lens_version nor the fields"),
        ("saelens-old-relu", set_to(sae_lens_version="²"), "sae_lens_version='²' should be like '6.0.0'"),
        ("saelens-old-relu", set_to(sae_lens_version=[6]), "sae_lens_version=a list should be like"),
        # sizes, kinds, unknown fields
        ("saelens-topk", set_to(d_in=13), r"'W_enc' has shape \[12, 24\], expected \[d_in=13, features=24\]"),
        ("saelens-topk", set_to(k=0), "field k=0 should be a positive whole number"),
        ("saelens-topk", set_to(k=25), "k=25 must lie between 1 and features=24"),
        ("saelens-topk", set_to(d_sae=10**12), "expected .d_in=12, features=1000000000000"),
        ("saelens-topk", set_to(gain=2), "unknown config field gain=2"),
        ("saelens-topk", set_to(apply_b_dec_to_input="yes"), "apply_b_dec_to_input='yes' should be true or false"),
        ("saelens-topk", set_to(reshape_activations="hook_z"), "reshape_activations='hook_z' contradicts hook_name="),
        ("saelens-transcoder", set_to(apply_b_dec_to_input=True), "apply_b_dec_to_input=true has no meaning"),
        ("sparsify-sae/layers.1", set_to(num_latents=0, expansion_factor=3), r"expected \[features=36, d=12\]"),
        ("sparsify-sae/layers.1", set_to(transcode="no"), "transcode='no' should be true or false"),
        ("sparsify-sae/layers.1", set_to(skip_connection=True), "skip_connection=true without transcode"),
        ("sparsify-skip_transcoder/h.1.mlp", set_to(skip_connection=False), "tensor 'W_skip' is unknown"),
        ("sparsify-sae/layers.1", set_to(batch_topk=True), "unknown config field batch_topk=True"),
    ],
)  # fmt: skip
def test_configurations(name: str, config: Edit, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(edited(name, tmp_path, config=config))


def trainer(**fields: Any) -> Edit:
    return lambda config: config["trainer"].update(fields)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "AutoEncoderTopK",
            trainer(dict_class="AutoEncoder"),
            "arrays of AutoEncoderTopK or BatchTopKSAE: dict_class=",
        ),
        ("AutoEncoder", trainer(dict_class="Crosscoder"), "dict_class='Crosscoder' is not supported"),
        ("AutoEncoderTopK", trainer(k=6), r"k=6, but ae\.pt has 5"),
        ("AutoEncoder", trainer(dict_size=23), r"expected \[features=23, d=12\]"),
        ("AutoEncoder", trainer(submodule_name="layer 1"), "submodule_name='layer 1' says no place .* pass site="),
        ("AutoEncoder", lambda config: config["buffer"].update(io="in"), "buffer.io='in'.* pass site="),
        ("AutoEncoderTopK", lambda config: config.clear(), "arrays of AutoEncoderTopK or BatchTopKSAE: put the config"),
        ("AutoEncoder", lambda config: config.update(trainer=[1]), "config field trainer should be an object"),
    ],
)
def test_dictionary_learning_configurations(name: str, config: Edit, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(edited(f"dictionary_learning-{name}", tmp_path, config=config))


@pytest.mark.parametrize(
    ("name", "arrays", "message"),
    [
        ("saelens-standard", transposed("W_dec"), r"'W_dec' has shape \[12, 24\], expected .features=24.*transposed"),
        ("saelens-standard", transposed("W_enc"), "'W_enc' has shape .* it is transposed"),
        ("saelens-skip_transcoder", transposed("W_skip"), "'W_skip' has shape .* it is transposed"),
        ("sparsify-transcoder/layers.1.mlp", transposed("W_dec"), "'W_dec' has shape .* it is transposed"),
        (SCOPE, transposed("W_dec"), "'W_dec' has shape .* it is transposed"),
        ("saelens-topk", broken("W_dec"), "1 of 288 values of tensor 'W_dec' are NaN or infinite"),
        ("sparsify-sae/layers.1", broken("encoder.bias", np.inf), "1 of 24 values of tensor 'encoder.bias' are NaN"),
        (SCOPE, broken("threshold"), "1 of 24 values of tensor 'threshold' are NaN"),
        (SCOPE, without("threshold"), "tensor 'threshold' is missing"),
        (SCOPE, lambda arrays: arrays.update(scaling_factor=np.full(24, 2.0)), "'scaling_factor' is not 1"),
        (SCOPE, lambda arrays: arrays.update(b_dec=arrays["b_dec"].astype(float) / 3), "'b_dec' has type float64 and"),
        (SCOPE, lambda arrays: arrays.update(b_dec=np.arange(12)), "tensor 'b_dec' has type int64; supported"),
        ("saelens-topk", lambda a: a.update(b_enc=np.arange(24)), "'b_enc' has type I64"),
        ("saelens-old-relu", lambda a: a.update(scaling_factor=np.full(24, 2, np.float32)), "'scaling_factor' is not"),
        ("saelens-topk-rescaled", lambda a: a["W_dec"].__setitem__(3, 0), "write vector of length 0"),
    ],
)  # fmt: skip
def test_arrays(name: str, arrays: Edit, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(edited(name, tmp_path, arrays=arrays))


def test_sparsifys_configuration_beside_saelens_arrays_is_refused(tmp_path: Path) -> None:
    """It would be read as a ReLU in silence."""
    place = copied("saelens-standard", tmp_path)
    for fields in ({"d_in": 12, "activation": "topk", "k": 5}, {"d_in": 12}):
        (place / "cfg.json").write_text(json.dumps(fields))
        with pytest.raises(UserError, match="it is of another library"):
            read(place, site=HERE)


def test_truncated_tensors(tmp_path: Path) -> None:
    for name, file in (("saelens-topk", "sae_weights.safetensors"), ("sparsify-sae/layers.1", "sae.safetensors")):
        place = copied(name, tmp_path)
        (place / file).write_bytes((place / file).read_bytes()[:-40])
        with pytest.raises(UserError, match=r"tensor '.*' ends at byte \d+, but the file has \d+: it is truncated"):
            read(place)
    for name, file in ((SCOPE, "params.npz"), ("dictionary_learning-AutoEncoder", "ae.pt")):
        place = copied(name, tmp_path)
        (place / file).write_bytes((place / file).read_bytes()[:-40])
        with pytest.raises(UserError, match="damaged or truncated"):
            read(place)


def test_absurd_sizes_allocate_nothing(tmp_path: Path) -> None:
    place = copied("saelens-topk", tmp_path)
    huge = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    header = json.dumps({name: huge for name in ("W_enc", "W_dec", "b_enc", "b_dec")}).encode()
    (place / "sae_weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))

    refused(lambda: read(place), r"overlaps|truncated")

    npz = copied(SCOPE, tmp_path) / "params.npz"
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(claim, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("W_enc.npy", claim.getvalue() + bytes(64))

    refused(lambda: read(npz), r"'W_enc' claims shape \[1000000, 1000000\].*but 64 are there")
    with zipfile.ZipFile(npz, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", bytes(64 * MEGABYTE))
    refused(lambda: read(npz), "claims to unpack to 67108864: weights do not compress so well")


def test_npz_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    npz = copied(SCOPE, tmp_path) / "params.npz"
    np.savez(npz, W_enc=np.array([{"run": "me"}], dtype=object))
    with pytest.raises(UserError, match="array 'W_enc' holds pickled objects, which can run code"):
        read(npz)
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00\x76\x00{'descr': __import__('os').getcwd()}")
    with pytest.raises(UserError, match="array 'W_enc' has no readable header"):
        read(npz)
    with zipfile.ZipFile(npz, "w") as archive:  # a product that Python refuses to print
        shape = f"({10**4000}, {10**4000})"
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
        archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(UserError, match="array 'W_enc' claims an axis that no array has"):
        read(npz)
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("run.py", b"")
    with pytest.raises(UserError, match=r"member 'run\.py' is not a \.npy array"):
        read(npz)


FILES = [
    ("saelens", "saelens-jumprelu", "sae_weights.safetensors"),
    ("saelens", "saelens-jumprelu", "cfg.json"),
    ("sparsify", "sparsify-sae/layers.1", "cfg.json"),
    ("gemma_scope", SCOPE, "params.npz"),
    ("dictionary_learning", "dictionary_learning-MatryoshkaBatchTopKSAE", "ae.pt"),
    ("dictionary_learning", "dictionary_learning-MatryoshkaBatchTopKSAE", "config.json"),
]


@pytest.mark.parametrize(("format", "name", "file"), FILES)
def test_damage_anywhere_is_a_user_error(format: str, name: str, file: str, tmp_path: Path) -> None:
    """Bytes flipped, dropped and doubled at random: read, or refused in words; never another error."""
    place = copied(name, tmp_path)
    whole, rng, refusals = (place / file).read_bytes(), np.random.default_rng(0), 0
    reader = READERS[format]
    for _ in range(150):
        data = bytearray(whole)
        start = int(rng.integers(len(data)))
        match rng.integers(3):
            case 0:
                data[start] = int(rng.integers(256))
            case 1:
                del data[start : start + int(rng.integers(1, 20))]
            case 2:
                data[start:start] = data[start : start + int(rng.integers(1, 20))]
        (place / file).write_bytes(data)
        try:
            reader.read(place if reader.takes_folder else reader.found(place)[0])
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error).replace("\\n", "")
    assert refusals > 20


def test_what_to_read_must_be_clear(tmp_path: Path) -> None:
    place = copied("saelens-topk", tmp_path)
    shutil.copy(GOLDENS / SCOPE / "params.npz", place)
    with pytest.raises(UserError, match="has files of saelens and gemma_scope: pass format="):
        read(place)
    assert read(place, format="saelens").activation.k == 5
    assert read(place, format="gemma_scope", site="blocks/0/resid/post").features == 24
    with pytest.raises(UserError, match=r"no sae\.safetensors in"):
        read(place, format="sparsify")
    with pytest.raises(UserError, match="nothing is at"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError,
        match=r"no sae_weights\.safetensors or sae\.safetensors or .*ae\.pt or .* in ",
    ):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="has an unknown format"):
        read(place / "cfg.json")
    (place / "cfg.json").unlink()
    with pytest.raises(UserError, match=r"no cfg\.json in"):
        read(place, format="saelens")


def test_sites_must_fit_the_file() -> None:
    sae, transcoder, scope = (GOLDENS / name for name in ("saelens-topk", "saelens-transcoder", SCOPE))
    assert read(sae, site="blocks/7/mlp").sites == Sites("blocks/7/mlp/out", "blocks/7/mlp/out")
    assert read(sae, site="blocks/7/mlp/in").sites == Sites("blocks/7/mlp/in", "blocks/7/mlp/in")
    assert read(transcoder, site="blocks/7/mlp").sites == Sites("blocks/7/mlp/in", "blocks/7/mlp/out")
    with pytest.raises(UserError, match="'blocks/7/mlp/out' is one array: for a transcoder pass a leaf, or Sites"):
        read(transcoder, site="blocks/7/mlp/out")
    with pytest.raises(UserError, match="does not fit the file, which holds an autoencoder"):
        read(sae, site=Sites("blocks/7/mlp/in", "blocks/7/mlp/out"))
    with pytest.raises(UserError, match="tokens are given without subject"):
        read(sae, tokens=grain.MapDataset.range(1))
    with pytest.raises(UserError, match=r"scaling_factor=2\.0: a transcoder has two scales"):
        read(transcoder, scaling_factor=2.0)
    assert read(scope).sites == HERE


def test_gemma_scope_without_its_folders_needs_a_site(tmp_path: Path) -> None:
    file = tmp_path / "params.npz"
    shutil.copy(GOLDENS / SCOPE / "params.npz", file)
    with pytest.raises(UserError, match=r"the folders' names say neither gemma-scope-.* pass site="):
        read(file)
    with pytest.raises(UserError, match="does not say whether it is a transcoder; pass Sites"):
        read(file, site="blocks/1/mlp")
    with pytest.raises(
        UserError, match=r"before the norm's gain and bias, and our 'blocks/1/mlp/in' is behind.*subject="
    ):
        read(file, site=Sites("blocks/1/mlp/in", "blocks/1/mlp/added"))
    place = tmp_path / "gemma-scope-9b-pt-att" / "embedding" / "width_4k"
    place.mkdir(parents=True)
    with pytest.raises(UserError, match="dictionaries of the embedding are in other units"):
        read(shutil.copy(file, place))


def test_a_scale_that_the_caller_knows() -> None:
    """y = f(s x) / s."""
    plain, scaled = read(GOLDENS / "saelens-standard"), read(GOLDENS / "saelens-standard", scaling_factor=4.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 12)), jnp.float32)
    np.testing.assert_allclose(scaled(x), plain(4 * x) / 4, atol=1e-5)
    np.testing.assert_allclose(scaled.encode(x).dense(), plain.encode(4 * x).dense(), atol=1e-5)
    with pytest.raises(UserError, match=r"scaling_factor=-1\.0 must be a positive number"):
        read(GOLDENS / "saelens-standard", scaling_factor=-1.0)


def test_finetuned_scales_multiply_write_vectors(tmp_path: Path) -> None:
    factors = np.linspace(0.5, 2, 24).astype(np.float32)
    place = edited(
        "saelens-old-relu",
        tmp_path,
        config=set_to(finetuning_scaling_factor=True),
        arrays=lambda arrays: arrays.update(scaling_factor=factors),
    )
    before, after = (read(where, centred=False) for where in (GOLDENS / "saelens-old-relu", place))
    np.testing.assert_array_equal(after.decoder, before.decoder * factors[:, None])
    np.testing.assert_array_equal(after.encoder, before.encoder)


def test_finetuned_scales_come_after_the_rescaling(tmp_path: Path) -> None:
    """y = ((z / |W|) f) W + b: the codes are those without f."""
    factors = np.linspace(0.5, 2, 24).astype(np.float32)
    place = edited(
        "saelens-topk-rescaled",
        tmp_path,
        config=set_to(finetuning_scaling_factor=True),
        arrays=lambda arrays: arrays.update(scaling_factor=factors),
    )
    found, stored = read(place), load_file(place / "sae_weights.safetensors")
    with np.load(GOLDENS / "saelens-topk-rescaled" / "expected.npz") as expected:
        x, z = jnp.asarray(expected["x"]), expected["z"]
    np.testing.assert_allclose(found.encode(x).dense(), z, rtol=0, atol=1e-5)
    lengths = np.linalg.norm(stored["W_dec"], axis=1)
    np.testing.assert_allclose(found(x), (z / lengths * factors) @ stored["W_dec"] + stored["b_dec"], atol=1e-5)


def test_an_unmeasured_threshold_is_refused(tmp_path: Path) -> None:
    place = copied("dictionary_learning-BatchTopKSAE", tmp_path)
    with zipfile.ZipFile(place / "ae.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    unset = {name: data for name, data in members.items() if data == np.float32(0.7).tobytes()}
    assert len(unset) == 1
    with zipfile.ZipFile(place / "ae.pt", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, np.float32(-1).tobytes() if name in unset else data)
    with pytest.raises(UserError, match=r"threshold=-1\.0 was never measured"):
        read(place)
