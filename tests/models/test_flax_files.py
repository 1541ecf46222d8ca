"""Flax checkpoints: what Flax and Orbax wrote comes back exactly; damaged and hostile files are refused by name."""

import math
import os
import pickle
import re
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import orbax.checkpoint as orbax
import pytest
from flax import nnx

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.models.adapters import Places, fill_nnx, from_linen, from_nnx, read_flax
from jaxinterp.models.run import run
from tests.models.flax_llamas import LinenLlama, NNXLlama, linen_params, nnx_llama, own_llama, random_tokens

TREE = {
    "params": {
        "layer_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "half": jnp.ones((2,), jnp.bfloat16)},
        "layers": [np.ones((1, 4), np.int8), np.asarray(True)],
        "nothing": {},
    },
    "step": 7,
    "rate": np.float64(0.5),
    "none": None,
}
EXPECTED = {
    "params/layer_0/half": TREE["params"]["layer_0"]["half"],
    "params/layer_0/kernel": TREE["params"]["layer_0"]["kernel"],
    "params/layers/0": TREE["params"]["layers"][0],
    "params/layers/1": np.asarray(True),
    "rate": np.float64(0.5),
    "step": np.asarray(7),
}


def assert_expected(arrays):
    leaves = named_leaves(arrays)
    assert sorted(leaves) == sorted(EXPECTED)
    for name, array in EXPECTED.items():
        assert isinstance(leaves[name], np.ndarray) and leaves[name].dtype == np.asarray(array).dtype, name
        np.testing.assert_array_equal(leaves[name], np.asarray(array))


@pytest.mark.parametrize("pieces", [None, 3])
def test_what_flax_wrote_comes_back(tmp_path: Path, monkeypatch, pieces):
    """Invariant 7; also where arrays are so large that Flax cuts them into pieces."""
    if pieces:
        monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", pieces * 4)
    path = tmp_path / "model.msgpack"
    path.write_bytes(flax.serialization.to_bytes(TREE))
    assert (b"__msgpack_chunked_array__" in path.read_bytes()) == bool(pieces)
    assert_expected(read_flax(path))


def save_standard(folder, tree):
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)


def save_by_manager(folder, tree):
    with orbax.CheckpointManager(folder.parent / "run") as manager:
        manager.save(3, args=orbax.args.StandardSave(tree))
        manager.wait_until_finished()
    (folder.parent / "run" / "3").rename(folder)


@pytest.mark.parametrize(
    "save",
    [orbax.v1.save, orbax.PyTreeCheckpointer().save, save_standard, save_by_manager],
    ids=lambda save: save.__name__,
)
def test_what_orbax_wrote_comes_back(tmp_path: Path, save):
    """Invariant 7; whichever of Orbax's ways wrote it."""
    save(tmp_path / "saved", {name: entry for name, entry in TREE.items() if entry is not None})
    assert_expected(read_flax(tmp_path / "saved"))


def test_models_are_filled_from_files(tmp_path: Path):
    """A Linen model's parameters by msgpack, an NNX model's state by Orbax, keys and dropout's counters and all."""
    own = own_llama()
    (tmp_path / "linen.msgpack").write_bytes(flax.serialization.to_bytes({"params": linen_params(own)}))
    orbax.v1.save(tmp_path / "nnx", nnx.state(nnx_llama(own)))
    places = Places(mlp="layers/{i}/mlp")
    empty = NNXLlama(nnx.Rngs(5))
    models = [
        own,
        from_linen(LinenLlama(), read_flax(tmp_path / "linen.msgpack"), Places(mlp="layer_{i}/mlp")),
        from_nnx(fill_nnx(empty, read_flax(tmp_path / "nnx")), places),
    ]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(models))
    logits = [jax.jit(lambda model: run(model, random_tokens()).logits)(model) for model in models]
    for each in logits[1:]:
        np.testing.assert_allclose(each, logits[0], rtol=1e-5, atol=1e-5)
    assert not np.any(empty.head.kernel), "the given model stays as it is"

    arrays = read_flax(tmp_path / "nnx")
    kernel = arrays["layers"]["1"]["mlp"]["up_proj"].pop("kernel")
    with pytest.raises(UserError, match="missing array 'layers/1/mlp/up_proj/kernel'"):
        fill_nnx(empty, arrays)
    arrays["layers"]["1"]["mlp"]["up_proj"]["kernel"] = {"value": kernel["value"].T}
    with pytest.raises(UserError, match=r"'layers/1/mlp/up_proj/kernel' has shape \(48, 32\), but .* \(32, 48\)"):
        fill_nnx(empty, arrays)
    arrays["layers"]["1"]["mlp"]["up_proj"] = {"kernel": kernel, "bias": kernel}
    with pytest.raises(UserError, match="unexpected array 'layers/1/mlp/up_proj/bias'"):
        fill_nnx(empty, arrays)


class Normed(nnx.Module):
    """Holds variables of every kind: parameters, statistics, a plain variable, keys."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.steps = nnx.Variable(jnp.zeros((), jnp.int32))


def test_what_is_no_parameter_is_filled_too(tmp_path: Path):
    saved = Normed()
    saved.norm.mean[...] = jnp.asarray([1.0, 2.0, 3.0])
    saved.norm.scale[...] = jnp.asarray([4.0, 5.0, 6.0])
    saved.steps[...] = jnp.asarray(7)
    saved.dropout.rngs.count[...] = jnp.asarray(9, jnp.uint32)
    orbax.v1.save(tmp_path / "nnx", nnx.state(saved))
    arrays = read_flax(tmp_path / "nnx")
    model = fill_nnx(Normed(), arrays)
    assert model.norm.mean.tolist() == [1.0, 2.0, 3.0] and model.norm.scale.tolist() == [4.0, 5.0, 6.0]
    assert model.steps == 7 and model.dropout.rngs.count == 0
    parameters = {"norm": {name: arrays["norm"][name] for name in ("scale", "bias")}}
    model = fill_nnx(Normed(), parameters)
    assert model.norm.mean.tolist() == [0.0, 0.0, 0.0] and model.norm.scale.tolist() == [4.0, 5.0, 6.0]
    with pytest.raises(UserError, match=r"variable 'norm/mean' has shape \(2,\), but the model's has \(3,\)"):
        fill_nnx(Normed(), {"norm": parameters["norm"] | {"mean": np.zeros(2)}})
    with pytest.raises(UserError, match="unexpected array 'norm/means'"):
        fill_nnx(Normed(), {"norm": parameters["norm"] | {"means": np.zeros(3)}})


def packed(shape, name, buffer, code=1):
    return msgpack.packb({"a": msgpack.ExtType(code, msgpack.packb((shape, name, buffer)))})


def chunked(shape, *pieces):
    parts = {
        str(index): msgpack.ExtType(1, msgpack.packb((p.shape, "float32", p.tobytes())))
        for index, p in enumerate(pieces)
    }
    return msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": shape, "chunks": parts}})


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("/tmp/this-must-never-be-made",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a msgpack file of Flax, or it is damaged"),
        (pickle.dumps(Hostile()), "is not a msgpack file of Flax|holds|is a "),
        (flax.serialization.to_bytes(TREE)[:-20], "damaged"),
        (packed((4, 10**15), "float32", bytes(16)), r"shape \[4, 1000000000000000\] and dtype float32 has 16 bytes"),
        (packed((-1, 4), "float32", bytes(16)), "is not stored as"),
        (packed((4,), "O", bytes(32)), "has dtype b'O'; read are bool, int8"),
        (packed((4,), "i4,(9999999,)f8", bytes(32)), "has dtype"),
        (packed((4,), "float32", bytes(16), code=2), "of the unknown kind 2"),
        (packed((4,), "float32", bytes(16), code=9), "of the unknown kind 9"),
        (msgpack.packb({"a": {"b": "text"}}), "a/b is a str; arrays and numbers are read"),
        (msgpack.packb({"a": {1: 2.0, "1": 3.0}}), "a holds a number and the same number as text"),
        (b"\xdd\x7f\xff\xff\xff" * 200, "damaged"),
        (chunked({"0": 4, "1": 4}, np.zeros(8, np.float32)), r"large array do not make up its shape \[4, 4\]"),
        (chunked({"0": "4"}, np.zeros(4, np.float32)), "do not make up"),
        (msgpack.packb({"__msgpack_chunked_array__": True}), "is not stored as shape and chunks"),
    ],
    ids=[
        "empty", "pickle", "truncated", "absurd size", "negative size", "objects", "records", "complex", "unknown",
        "text", "names", "long lists", "wrong pieces", "wrong shape", "no pieces",
    ],
)  # fmt: skip
def test_damaged_and_hostile_files_are_refused(tmp_path: Path, content, words):
    path = tmp_path / "model.msgpack"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_flax(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert not Path("/tmp/this-must-never-be-made").exists()


def test_other_files_are_refused(tmp_path: Path, monkeypatch):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"model\.pkl"):
        read_flax(tmp_path / "model.pkl")
    with pytest.raises(UserError, match=r"no checkpoint .*missing: give a msgpack file or an Orbax folder"):
        read_flax(tmp_path / "missing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder cannot be read as an Orbax checkpoint"):
        read_flax(tmp_path / "folder")
    orbax.v1.save(tmp_path / "run" / "20", {"a": np.zeros(1000)})
    with pytest.raises(UserError, match=f"holds checkpoints of 1 steps: .* such as {re.escape(str(tmp_path))}/run/20"):
        read_flax(tmp_path / "run")
    small = {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", small.__getitem__)
    with pytest.raises(UserError, match=r"its arrays would take 7.45e-06 GiB, and this machine has 3.81e-06 GiB"):
        read_flax(tmp_path / "run" / "20")
    assert math.isclose(8000 / 2**30, 7.45e-06, rel_tol=1e-3)


def test_a_damaged_orbax_checkpoint_is_refused(tmp_path: Path):
    orbax.v1.save(tmp_path / "saved", {"a": np.random.default_rng(0).normal(size=1000)})
    data = max(
        (path for path in (tmp_path / "saved").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(UserError, match=r"saved cannot be read|of checkpoint .*saved cannot be read"):
        read_flax(tmp_path / "saved")
