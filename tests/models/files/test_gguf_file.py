"""GGUF files: as llama.cpp writes them, quantised, sharded; damaged and foreign ones are refused."""

from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.models.load import load
from jaxinterp.models.transformer import initialise
from tests.models.model_files import GOLDENS, LLAMA, mesh, write_gguf


def test_gguf_equals_the_golden(tmp_path: Path) -> None:
    """Logits of transformers, through a GGUF file with permuted query and key weights."""
    expected = np.load(GOLDENS / "llama" / "expected.npz", allow_pickle=False)
    write_gguf(tmp_path / "llama.gguf", load(GOLDENS / "llama").model, gguf.GGMLQuantizationType.F32)
    subject = load(tmp_path / "llama.gguf")
    logits = np.asarray(subject.model(jnp.asarray(expected["tokens"])))
    assert np.abs(logits - expected["logits"]).max() < 1e-4 * np.abs(expected["logits"]).max()
    assert subject.name == "llama"
    assert subject.tokenizer is not None
    assert subject.tokenizer.vocab_size == 48


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_quantised_gguf(kind: str, tmp_path: Path) -> None:
    """Grouped keys; every leaf is the dequantised one, whole and in shards."""
    model, quantisation = initialise(LLAMA, jax.random.key(1)), gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "model.gguf", model, quantisation)

    def rounded(name: str, leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        if leaf.ndim == 1:
            return leaf
        stored = np.ascontiguousarray(leaf if name == "embedding/token" else leaf.T)
        back = gguf.dequantize(gguf.quantize(stored, quantisation), quantisation)
        return back if name == "embedding/token" else back.T

    expected = {name: rounded(name, leaf) for name, leaf in named_leaves(model).items()}
    split = NamedSharding(mesh(), PartitionSpec(None, "feature"))
    sharding = lambda name, shape: split if len(shape) == 2 else NamedSharding(mesh(), PartitionSpec())
    for loaded in [load(tmp_path / "model.gguf").model, load(tmp_path / "model.gguf", sharding=sharding).model]:
        for name, leaf in named_leaves(loaded).items():
            np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def split_model(folder: Path, split: int = 8) -> tuple[Path, list[Path]]:
    """A model in one file, and the same in several."""
    model, kind = initialise(LLAMA, jax.random.key(1)), gguf.GGMLQuantizationType.F32
    write_gguf(folder / "whole.gguf", model, kind)
    write_gguf(folder / "model.gguf", model, kind, split=split)
    return folder / "whole.gguf", sorted(folder.glob("model-*.gguf"))


def test_a_split_model_is_read_from_any_of_its_files(tmp_path: Path) -> None:
    """Kind F: as gguf-split and llama.cpp's converter write large models."""
    whole, parts = split_model(tmp_path)
    assert len(parts) > 1 and parts[0].name == f"model-00001-of-{len(parts):05}.gguf"
    expected = named_leaves(load(whole).model)
    for part in (parts[0], parts[-1]):
        subject = load(part)
        assert subject.name == "model" and subject.tokenizer is not None
        for name, leaf in named_leaves(subject.model).items():
            np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def test_parts_that_are_missing_or_misnamed_are_told(tmp_path: Path) -> None:
    _, parts = split_model(tmp_path)
    last = parts[-1].read_bytes()
    parts[-1].unlink()
    with pytest.raises(UserError, match=f"{parts[-1].name} is missing: fetch all"):
        load(parts[0])
    parts[-1].write_bytes(parts[1].read_bytes())
    if len(parts) > 2:
        with pytest.raises(UserError, match=r"says that it is file 2 of \d, but its name says"):
            load(parts[0])
    parts[-1].write_bytes(last)
    single = tmp_path / "copy.gguf"
    single.write_bytes(parts[0].read_bytes())
    with pytest.raises(UserError, match=r"says that it is file 1 of \d, but its name says 1 of 1"):
        load(single)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_count": 8.0}, r"unknown metadata llama\.expert_count=8\.0"),
        ({"llama.rope.scaling.factor": 2.0}, r"llama\.rope\.scaling\.type='none' with factor 2\.0: scaled rotary"),
        ({"llama.attention.value_length": 4.0}, r"llama\.attention\.value_length=4\.0 differs from the head size 8"),
        ({"llama.rope.scaling.type": 1.0}, r"scaled rotary positions"),
    ],
)
def test_gguf_metadata_that_is_not_computed_is_refused(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", initialise(LLAMA, jax.random.key(1)), gguf.GGMLQuantizationType.F32, extra)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "x.gguf")


def test_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"general\.architecture='falcon' is not supported in GGUF files"):
        load(tmp_path / "x.gguf")


def test_truncated_gguf_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", initialise(LLAMA, jax.random.key(1)), gguf.GGMLQuantizationType.F32)
    raw, path = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "x.gguf"
    for kept in [0, 3, 8, 20, 100, 1000, len(raw) // 2, len(raw) - 1]:
        path.write_bytes(raw[:kept])
        with pytest.raises(UserError, match=r"x\.gguf cannot be read as GGUF"):
            load(path)
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match=r"tensor 'blk\.\d\..*' ends at byte"):
        load(path)
    path.write_bytes(b"not a GGUF file at all")
    with pytest.raises(UserError, match=r"cannot be read as GGUF \(GGUF magic invalid\)"):
        load(path)


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_damaged_bytes_never_crash(kind: str, golden: Path, tmp_path: Path) -> None:
    """Random bytes in the header: either the model loads, or the error is the user's."""
    if kind == "gguf":
        path = source = tmp_path / "x.gguf"
        write_gguf(path, initialise(LLAMA, jax.random.key(1)), gguf.GGMLQuantizationType.Q8_0)
    else:
        path, source = golden / "model.safetensors", golden
    raw, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(60 if kind == "safetensors" else 20):
        damaged = bytearray(raw)
        for position in rng.integers(0, 2000, rng.integers(1, 5)):
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            load(source)
        except UserError:
            refused += 1
    assert refused > 3
