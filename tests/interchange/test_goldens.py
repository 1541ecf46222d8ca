"""Files by the other libraries' own savers give their codes and outputs. Made by make_goldens.py."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.decompositions.activations import ReLU, TopK
from jaxinterp.decompositions.gates import Gated, JumpReLU
from jaxinterp.interchange import read

GOLDENS = Path(__file__).parent / "goldens"
FOLDERS = sorted(path.parent for path in GOLDENS.rglob("expected.npz"))
RESID = Sites("blocks/1/resid/post", "blocks/1/resid/post")
MLP = Sites("blocks/1/mlp/in", "blocks/1/mlp/out")


def test_every_format_and_architecture_is_there() -> None:
    names = {folder.relative_to(GOLDENS).parts[0] for folder in FOLDERS}
    assert len(names) == 22
    assert {name.split("-")[0] for name in names} == {"saelens", "sparsify", "dictionary_learning", "gemma"}
    assert sum(path.stat().st_size for path in GOLDENS.rglob("*") if path.is_file()) < 200_000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(GOLDENS)))
def test_codes_and_outputs_are_theirs(folder: Path) -> None:
    dictionary = read(folder, centred=False if "old" in folder.name else None)
    with np.load(folder / "expected.npz", allow_pickle=False) as expected:
        x = jnp.asarray(expected["x"])
        np.testing.assert_allclose(dictionary.encode(x).dense(), expected["z"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(dictionary(x), expected["y"], rtol=0, atol=1e-5)
        assert 0.1 < np.mean(expected["z"] != 0) < 0.7 and np.ptp(expected["y"]) > 1, "the golden would show nothing"


@pytest.mark.parametrize(
    ("name", "sites", "activation"),
    [
        ("saelens-standard", RESID, ReLU),
        ("saelens-topk-rescaled", RESID, TopK),
        ("saelens-gated", RESID, Gated),
        ("saelens-jumprelu_skip_transcoder", MLP, JumpReLU),
        ("saelens-old-relu", Sites("blocks/1/resid/pre", "blocks/1/resid/pre"), ReLU),
        ("saelens-old-topk", Sites("blocks/1/resid/pre", "blocks/1/resid/pre"), TopK),
        ("sparsify-sae/layers.1", RESID, TopK),
        ("sparsify-skip_transcoder/h.1.mlp", MLP, TopK),
        ("gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_5", RESID, JumpReLU),
        ("dictionary_learning-AutoEncoderTopK", RESID, TopK),
        ("dictionary_learning-MatryoshkaBatchTopKSAE", RESID, JumpReLU),
    ],
)
def test_sites_and_activation_are_what_the_file_says(name: str, sites: Sites, activation: type) -> None:
    dictionary = read(GOLDENS / name, centred=False if "old" in name else None)
    assert dictionary.sites == sites and type(dictionary.activation) is activation
    assert np.isnan(dictionary.target_variance), "nothing is known of the target"


def test_a_file_in_its_folder_will_do() -> None:
    for file in ("saelens-topk/sae_weights.safetensors", "dictionary_learning-AutoEncoder/ae.pt"):
        a, b = read(GOLDENS / file), read((GOLDENS / file).parent)
        np.testing.assert_array_equal(a.encoder, b.encoder)
