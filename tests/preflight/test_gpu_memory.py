"""The count by hand of `benchmarks.gpu_memory`, against programs compiled here; `make test-gpu` does it for H200s."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from benchmarks.gpu_memory import RUNS, Run, beyond, by_hand
from jaxinterp.commands.presets import planned
from jaxinterp.commands.train import Config
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.methods import Transcoder
from jaxinterp.models.files.gguf_file import gguf_config, open_gguf
from jaxinterp.models.files.shapes import model_shapes
from jaxinterp.models.files.weights import skeleton
from jaxinterp.models.files.wheels import wheel_path
from jaxinterp.preflight.check import Setting, preflight
from jaxinterp.preflight.chips import Target
from tests.preflight.made_up import HERE

TINY = Run("tiny", "blocks/1/mlp", features=512, k=4, batch=256, seq=32)


def test_the_count_by_hand_is_what_a_program_holds():
    """Eight virtual devices; the controls: a count that forgets the mesh, and a program that holds too much."""
    shapes = model_shapes("tiny", dtype="float32")
    found = preflight(
        Transcoder(features=512, k=4, auxk=0.0),
        lambda sharding: model_shapes("tiny", dtype="float32", sharding=sharding),
        TINY.site,
        Target("cpu:8", tuple(jax.devices()), HERE),
        Setting({"data": 2, "feature": 4, "model": 1}, TINY.batch),
        steps=20,
        seq=TINY.seq,
    ).program.memory
    counted = by_hand(shapes.config, TINY, itemsize=4)
    for kind in ("model weights", "dictionary", "optimizer", "activation buffer"):
        assert found[kind] == pytest.approx(counted[kind], rel=0.05)
    found, counted = ({kind: size for kind, size in of.items() if kind != "temporary"} for of in (found, counted))
    assert beyond(found, counted) == []  # temporary memory is the CPU compiler's: 1 MiB
    everywhere = by_hand(shapes.config, replace(TINY, mesh=(1, 1)), itemsize=4)
    assert any(reason.startswith("dictionary") for reason in beyond(found, everywhere))
    assert beyond(found | {"dictionary": 2**30}, counted)[0].startswith("dictionary")


def test_counts_by_hand_are_those_of_the_models():
    for run in RUNS:
        model = model_shapes(run.model)
        weights = sum(2 * leaf.size for leaf in named_leaves(model).values())
        assert by_hand(model.config, run)["model weights"] == weights


@pytest.mark.slow
def test_known_shapes_are_those_of_the_wheel():
    try:
        path = Path(wheel_path("smollm2-135m"))
    except UserError as missing:
        pytest.skip(str(missing))
    reader, tensors = open_gguf(path)
    real = named_leaves(skeleton(gguf_config(reader, tensors, path)))
    assert {name: leaf.shape for name, leaf in named_leaves(model_shapes("smollm2-135m")).items()} == {
        name: leaf.shape for name, leaf in real.items()
    }


def test_a_preflight_needs_no_weights():
    settings = {"model": "llama-3.1-8b", "site": "blocks/16/mlp", "features": 131072, "k": 64}
    assert planned(Config(Path("unused"), preflight="h200:8", **settings)).features == 131072
    with pytest.raises(UserError, match=r"no model 'llama-3\.1-8b'"):
        planned(Config(Path("unused"), **settings))
