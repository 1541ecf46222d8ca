"""Quantised Hugging Face folders: what is loaded is what each format's formula says, number by number."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.models.files.packing import awq_codes, mxfp4
from jaxinterp.models.files.quantised import unpacked
from jaxinterp.models.files.safetensors_file import open_safetensors
from jaxinterp.models.files.weights import StoredTensor
from jaxinterp.models.load import load
from tests.models.model_files import GOLDENS

MATRIX = "model.layers.0.mlp.up_proj"
LEAF = "blocks/0/mlp/up_proj/weight"
RNG = np.random.default_rng(0)


def golden(folder: Path, said: dict[str, Any] | None, replaced: dict[str, np.ndarray]) -> Path:
    """The Llama golden with one matrix in another form."""
    shutil.copytree(GOLDENS / "llama", folder / "llama")
    directory = folder / "llama"
    tensors = load_file(directory / "model.safetensors")
    del tensors[f"{MATRIX}.weight"]
    save_file(tensors | replaced, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    if said is not None:
        config["quantization_config"] = said
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def loaded(directory: Path) -> np.ndarray:
    """The matrix as PyTorch lays it out."""
    return np.asarray(named_leaves(load(directory, dtype="float32").model)[LEAF]).T


OUTPUTS, INPUTS = load_file(GOLDENS / "llama" / "model.safetensors")[f"{MATRIX}.weight"].shape


@pytest.mark.parametrize("block", [[8, 5], None])
def test_float8_with_scales(block: list[int] | None, tmp_path: Path) -> None:
    values = RNG.normal(size=(OUTPUTS, INPUTS)).astype(ml_dtypes.float8_e4m3fn)
    shape = (-(-OUTPUTS // 8), -(-INPUTS // 5)) if block else (OUTPUTS, 1)
    scales = RNG.uniform(0.5, 2, shape).astype(np.float32)
    raw = {f"{MATRIX}.weight": values.view(np.uint8), f"{MATRIX}.weight_scale_inv": scales}
    directory = golden(tmp_path, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}, raw)
    as_float8(directory)
    meant = np.array(
        [
            [float(values[o, i]) * scales[(o // 8, i // 5) if block else (o, 0)] for i in range(INPUTS)]
            for o in range(OUTPUTS)
        ]
    )
    np.testing.assert_allclose(loaded(directory), meant, rtol=1e-6)


def as_float8(directory: Path) -> None:
    """Call the bytes of the matrix float8 in the header."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header[f"{MATRIX}.weight"]["dtype"] = "F8_E4M3"
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + size :])


def test_float8_without_scales_is_refused(tmp_path: Path) -> None:
    values = RNG.normal(size=(OUTPUTS, INPUTS)).astype(ml_dtypes.float8_e4m3fn)
    for said, message in [({"quant_method": "fp8"}, r"weight_scale_inv' is missing"), (None, "has type F8_E4M3")]:
        directory = golden(tmp_path / str(said is None), said, {f"{MATRIX}.weight": values.view(np.uint8)})
        as_float8(directory)
        with pytest.raises(UserError, match=message):
            load(directory)


def test_awq(tmp_path: Path) -> None:
    """GEMM packing: piece p of a word is output 0 2 4 6 1 3 5 7 [p]."""
    size, order = 8, (0, 2, 4, 6, 1, 3, 5, 7)
    codes = RNG.integers(0, 16, (INPUTS, OUTPUTS))
    zeros = RNG.integers(0, 16, (INPUTS // size, OUTPUTS))
    scales = RNG.uniform(0.5, 2, (INPUTS // size, OUTPUTS)).astype(np.float16)

    def packed(numbers: np.ndarray) -> np.ndarray:
        words = np.zeros((numbers.shape[0], OUTPUTS // 8), np.uint32)
        for row in range(numbers.shape[0]):
            for word in range(OUTPUTS // 8):
                for piece in range(8):
                    words[row, word] |= np.uint32(int(numbers[row, 8 * word + order[piece]]) << 4 * piece)
        return words.view(np.int32)

    parts = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}
    said = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    directory = golden(tmp_path, said, {f"{MATRIX}.{name}": array for name, array in parts.items()})
    meant = np.array(
        [
            [(codes[i, o] - zeros[i // size, o]) * float(scales[i // size, o]) for i in range(INPUTS)]
            for o in range(OUTPUTS)
        ]
    )
    np.testing.assert_allclose(loaded(directory), meant, rtol=1e-6)
    assert not np.array_equal(awq_codes(parts["qweight"]), codes[:, np.argsort(order)])  # the other reading


@pytest.mark.parametrize(("bits", "version", "shuffled"), [(4, "gptq", False), (4, "gptq_v2", True), (8, "gptq", True)])
def test_gptq(bits: int, version: str, shuffled: bool, tmp_path: Path) -> None:
    size, pieces, most = 8, 32 // bits, 2**bits
    codes = RNG.integers(0, most, (INPUTS, OUTPUTS))
    zeros = RNG.integers(0, most, (INPUTS // size, OUTPUTS))
    scales = RNG.uniform(0.5, 2, (INPUTS // size, OUTPUTS)).astype(np.float16)
    group = np.arange(INPUTS) // size
    if shuffled:
        RNG.shuffle(group)

    def packed(numbers: np.ndarray) -> np.ndarray:
        words = np.zeros((numbers.shape[0] // pieces, numbers.shape[1]), np.uint32)
        for n in range(numbers.shape[0]):
            words[n // pieces] |= numbers[n].astype(np.uint32) << np.uint32(bits * (n % pieces))
        return words.view(np.int32)

    stored = (zeros - 1) % most if version == "gptq" else zeros
    parts = {"qweight": packed(codes), "qzeros": np.ascontiguousarray(packed(stored.T).T), "scales": scales}
    parts |= {"g_idx": group.astype(np.int32)} if shuffled else {}
    said = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "checkpoint_format": version,
        "desc_act": shuffled,
    }
    parts |= {"bias": np.zeros(OUTPUTS, np.float16)}  # of every packed matrix, whether the model has biases or not
    directory = golden(tmp_path / "0", said, {f"{MATRIX}.{name}": array for name, array in parts.items()})
    meant = ((codes - zeros[group]) * scales[group].astype(np.float64)).T
    np.testing.assert_allclose(loaded(directory), meant, rtol=1e-6)
    part = unpacked(said, open_safetensors(directory / "model.safetensors"), directory)[f"{MATRIX}.weight"]
    np.testing.assert_allclose(part.read(np.array([3, 1]), slice(3, 13)), meant[[3, 1], 3:13], rtol=1e-6)
    parts["scales"] = scales[:, :-1]
    broken = golden(tmp_path / "b", said, {f"{MATRIX}.{name}": np.ascontiguousarray(a) for name, a in parts.items()})
    with pytest.raises(UserError, match=r"scales' has shape"):
        load(broken)
    parts |= {"scales": scales, "bias": np.ones(OUTPUTS, np.float16)}
    with pytest.raises(UserError, match=r"unknown tensor .*bias"):
        load(golden(tmp_path / "c", said, {f"{MATRIX}.{name}": array for name, array in parts.items()}))


def stored(name: str, array: np.ndarray) -> StoredTensor:
    def read(rows: Any, columns: slice | None) -> np.ndarray:
        return array[rows] if columns is None else array[rows, columns]

    return StoredTensor(name, Path("x"), array.shape, read, kind="U8")


def test_mxfp4_as_gpt_oss_stores_it() -> None:
    """`[experts, d_out, groups, 16]` bytes and a scale each become `(experts, d_in, d_out)`."""
    experts, outputs, groups = 2, 3, 2
    blocks = RNG.integers(0, 256, (experts, outputs, groups, 16)).astype(np.uint8)
    scales = RNG.integers(120, 130, (experts, outputs, groups)).astype(np.uint8)
    meant = np.zeros((experts, 32 * groups, outputs))
    numbers = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    for e in range(experts):
        for o in range(outputs):
            for i in range(32 * groups):
                byte = blocks[e, o, i // 32, i % 32 // 2]
                q = int(byte >> 4 if i % 2 else byte & 15)
                meant[e, i, o] = numbers[q & 7] * (-1) ** (q >> 3) * 2.0 ** (int(scales[e, o, i // 32]) - 127)
    given = {"a_blocks": stored("a_blocks", blocks), "a_scales": stored("a_scales", scales)}
    found = unpacked({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, given, Path("x"))
    assert list(found) == ["a"]
    assert found["a"].shape == meant.shape
    np.testing.assert_array_equal(found["a"].read(slice(None), None), meant)
    np.testing.assert_array_equal(found["a"].read(slice(1, 2), slice(3, 40)), meant[1:2, 3:40])
    swapped = (blocks >> 4) | (blocks << 4)
    assert not np.array_equal(mxfp4(swapped, scales), mxfp4(blocks, scales))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes' is not supported"),
        ({"quant_method": "awq", "bits": 3, "group_size": 8}, "bits=3 is not supported"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size=0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 8, "twist": 1}, "unknown config field .*twist=1"),
    ],
)
def test_what_is_not_computed_is_refused(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    words = {"qweight": np.zeros((INPUTS // 8, OUTPUTS), np.int32), "qzeros": np.zeros((2, OUTPUTS // 8), np.int32)}
    words |= {"scales": np.ones((2, OUTPUTS), np.float16)}
    with pytest.raises(UserError, match=message):
        load(golden(tmp_path, said, {f"{MATRIX}.{name}": array for name, array in words.items()}))
