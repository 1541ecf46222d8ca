"""Preflight compiles every family of this folder for a mesh of eight and names the memory of what it holds."""

import jax
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.methods.factor.experts import HiddenExperts
from jaxinterp.methods.factor.interaction_basis import LocalInteractionBasis
from jaxinterp.methods.factor.linear_transforms import LinearTransformsMethod
from jaxinterp.methods.factor.mixture_of_decoders import MixtureOfDecodersMethod
from jaxinterp.methods.factor.parameter_training import AdversarialParameters, StochasticParameters
from jaxinterp.methods.factor.product_key_neurons import ProductKeyNeuronsMethod
from jaxinterp.methods.factor.semi_nmf import SemiNMF
from jaxinterp.methods.factor.targets import LeafTarget
from jaxinterp.models.files.shapes import model_shapes
from jaxinterp.preflight.check import Setting, preflight
from jaxinterp.preflight.chips import Chip, Target

SITE, D, HIDDEN = "blocks/1/mlp", 64, 128
CHIP = Chip("made up", flops=1e9, memory=2**30, memory_bandwidth=1e9, interconnect=1e8, clock=1e9)
TOKENS = 8 * 256

FAMILIES = {
    # (method, numbers learned that lie over `feature` or, in SPD and VPD, on every device; 2: Adam's moments; aux)
    "semi_nmf": (SemiNMF(features=16), 16 * HIDDEN / 4, 0, TOKENS * 16 / 2),
    "experts": (HiddenExperts(experts=512, k=4, shared=8, rank=8), 512 * (2 * D + 8) / 4, 2, 0),
    "interaction": (LocalInteractionBasis(probes=2), 0, 0, 2 * 2 * D * D),
    "decoders": (MixtureOfDecodersMethod(features=256, hidden=64, k=4), 256 * 2 * D / 4 + 64 * 2 * D, 2, 0),
    "transforms": (LinearTransformsMethod(ranks=(64, 32, 32), k=1), 128 * 2 * D / 4, 2, 0),
    "product_keys": (ProductKeyNeuronsMethod(n=16, channels=2, knn=4, d_key=16), 512 * 2 * D / 4, 2, 0),
    "parameters": (StochasticParameters(LeafTarget(SITE), parts=32), 32 * 2 * (D + HIDDEN), 2, 0),
    "adversary": (
        AdversarialParameters(LeafTarget(SITE), parts=32, scope="shared"), 32 * 2 * (D + HIDDEN), 2, 3 * 2 * 33,
    ),
}  # fmt: skip
FAST = ("semi_nmf", "experts")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_memory_is_named(name):
    method, learned, moments, aux = FAMILIES[name]
    shapes = lambda sharding=None: model_shapes("tiny", dtype="float32", sharding=sharding)
    target = Target("cpu:8", tuple(jax.devices()), CHIP)
    setting = Setting({"data": 2, "feature": 4, "model": 1}, 256)
    found = preflight(method, shapes, SITE, target, setting, steps=20, seq=32)
    memory = found.program.memory
    assert found.fits
    assert memory["dictionary"] == pytest.approx(4 * learned, rel=0.4, abs=600), "and biases, means, gates"
    assert memory["dictionary"] >= 4 * learned
    if moments:
        assert memory["optimizer"] >= 4 * moments * learned / 2, "spread over `data` besides"
    assert memory.get("codes, moments, sources", 0) == pytest.approx(4 * aux, rel=0.1)
    if name == "semi_nmf":
        assert memory["kept rows"] == 4 * TOKENS * (HIDDEN + 1) / 2 and memory["activation buffer"] == 0
    else:
        assert "kept rows" not in memory and memory["activation buffer"] >= 4 * TOKENS * (D + 1) / 2


def test_an_adversary_for_every_input_wants_windows():
    with pytest.raises(UserError, match="take scope='shared'"):
        AdversarialParameters(LeafTarget(SITE)).needs(SITE)
