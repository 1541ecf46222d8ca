"""Every quantised type of GGUF files against its own formula, number by number, in plain Python (ggml's block layouts).

The loader uses the gguf package's dequantisers, a few rows at a time; nothing here is shared with them.
"""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxinterp.models.files.gguf_file import open_gguf

Numbers = list[float]


def half(raw: bytes) -> float:
    return float(struct.unpack("<e", raw)[0])


def nibbles(raw: bytes) -> list[int]:
    """The lower halves, then the upper ones."""
    return [byte & 15 for byte in raw] + [byte >> 4 for byte in raw]


def q4_0(b: bytes) -> Numbers:
    return [half(b[:2]) * (q - 8) for q in nibbles(b[2:])]


def q4_1(b: bytes) -> Numbers:
    return [half(b[:2]) * q + half(b[2:4]) for q in nibbles(b[4:])]


def fifth(raw: bytes, low: list[int]) -> list[int]:
    bits = struct.unpack("<I", raw)[0]
    return [q | ((bits >> n) & 1) << 4 for n, q in enumerate(low)]


def q5_0(b: bytes) -> Numbers:
    return [half(b[:2]) * (q - 16) for q in fifth(b[2:6], nibbles(b[6:]))]


def q5_1(b: bytes) -> Numbers:
    return [half(b[:2]) * q + half(b[2:4]) for q in fifth(b[4:8], nibbles(b[8:]))]


def q8_0(b: bytes) -> Numbers:
    return [half(b[:2]) * q for q in struct.unpack("<32b", b[2:])]


def q2_k(b: bytes) -> Numbers:
    scales, codes, d, low = b[:16], b[16:80], half(b[80:82]), half(b[82:84])
    found = []
    for n in range(256):
        q = (codes[32 * (n // 128) + n % 32] >> 2 * (n % 128 // 32)) & 3
        scale = scales[n // 16]
        found.append(d * (scale & 15) * q - low * (scale >> 4))
    return found


def q3_k(b: bytes) -> Numbers:
    mask, codes, packed, d = b[:32], b[32:96], b[96:108], half(b[108:110])
    scales = []
    for n in range(16):
        low = packed[n] & 15 if n < 8 else packed[n - 8] >> 4
        high = (packed[8 + n % 4] >> 2 * (n // 4)) & 3
        scales.append((low | high << 4) - 32)
    found = []
    for n in range(256):
        q = (codes[32 * (n // 128) + n % 32] >> 2 * (n % 128 // 32)) & 3
        high = (mask[n % 32] >> (n // 32)) & 1
        found.append(d * scales[n // 16] * (q - (0 if high else 4)))
    return found


def six_bits(packed: bytes) -> tuple[list[int], list[int]]:
    """Scales and minima of Q4_K and Q5_K."""
    scales, lows = [], []
    for n in range(8):
        if n < 4:
            scales.append(packed[n] & 63)
            lows.append(packed[n + 4] & 63)
        else:
            scales.append(packed[n + 4] & 15 | (packed[n - 4] >> 6) << 4)
            lows.append(packed[n + 4] >> 4 | (packed[n] >> 6) << 4)
    return scales, lows


def q4_k(b: bytes) -> Numbers:
    d, low, (scales, lows), codes = half(b[:2]), half(b[2:4]), six_bits(b[4:16]), b[16:]
    found = []
    for n in range(256):
        byte = codes[32 * (n // 64) + n % 32]
        q = byte >> 4 if n % 64 >= 32 else byte & 15
        found.append(d * scales[n // 32] * q - low * lows[n // 32])
    return found


def q5_k(b: bytes) -> Numbers:
    d, low, (scales, lows), high, codes = half(b[:2]), half(b[2:4]), six_bits(b[4:16]), b[16:48], b[48:]
    found = []
    for n in range(256):
        byte = codes[32 * (n // 64) + n % 32]
        q = (byte >> 4 if n % 64 >= 32 else byte & 15) + 16 * ((high[n % 32] >> n // 32) & 1)
        found.append(d * scales[n // 32] * q - low * lows[n // 32])
    return found


def q6_k(b: bytes) -> Numbers:
    low, high, scales, d = b[:128], b[128:192], struct.unpack("<16b", b[192:208]), half(b[208:])
    found = []
    for n in range(256):
        part, at = n // 128, n % 128
        byte = low[64 * part + at % 64]
        q = (byte >> 4 if at >= 64 else byte & 15) | ((high[32 * part + at % 32] >> 2 * (at // 32)) & 3) << 4
        found.append(d * scales[n // 16] * (q - 32))
    return found


LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def iq4_nl(b: bytes) -> Numbers:
    return [half(b[:2]) * LEVELS[q] for q in nibbles(b[2:])]


def iq4_xs(b: bytes) -> Numbers:
    d, high, low, codes = half(b[:2]), struct.unpack("<H", b[2:4])[0], b[4:8], b[8:]
    found = []
    for block in range(8):
        scale = (low[block // 2] >> 4 * (block % 2)) & 15 | ((high >> 2 * block) & 3) << 4
        found += [d * (scale - 32) * LEVELS[q] for q in nibbles(codes[16 * block : 16 * block + 16])]
    return found


def mxfp4(b: bytes) -> Numbers:
    magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    return [2.0 ** (b[0] - 127) * magnitudes[q & 7] * (-1 if q & 8 else 1) for q in nibbles(b[1:])]


def bf16(b: bytes) -> Numbers:
    return [struct.unpack("<f", b"\0\0" + b[n : n + 2])[0] for n in range(0, len(b), 2)]


def f16(b: bytes) -> Numbers:
    return [half(b[n : n + 2]) for n in range(0, len(b), 2)]


TYPES: dict[str, Callable[[bytes], Numbers]] = {
    **{"Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q2_K": q2_k, "Q3_K": q3_k},
    **{"Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs, "MXFP4": mxfp4},
    **{"BF16": bf16, "F16": f16},
}
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2)}
HALVES |= {"Q5_K": (0, 2)}


def random_blocks(kind: str, rows: int, blocks: int) -> tuple[np.ndarray, list[Numbers]]:
    """Random bytes with scales near 1, and what they mean."""
    size, count = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    size, count = (32, 64) if kind in ("BF16", "F16") else (size, count)
    rng = np.random.default_rng(len(kind))
    raw = rng.integers(0, 256, (rows, blocks, count)).astype(np.uint8)
    if kind in ("BF16", "F16"):
        values = rng.normal(size=(rows, blocks, 32)).astype(np.float16)
        raw = values.view(np.uint8).reshape(rows, blocks, 64) if kind == "F16" else raw
        if kind == "BF16":
            raw[..., 1::2] = 63
    elif kind == "MXFP4":
        raw[..., 0] = rng.integers(120, 134, (rows, blocks))
    else:
        for at in HALVES.get(kind, (0,)):
            scale = rng.uniform(0.5, 2, (rows, blocks, 1)).astype(np.float16)
            raw[..., at : at + 2] = scale.view(np.uint8).reshape(rows, blocks, 2)
    meant = [[number for block in row for number in TYPES[kind](bytes(block))] for row in raw]
    return raw.reshape(rows, blocks * count), meant


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_are_those_of_the_formula(kind: str, tmp_path: Path) -> None:
    raw, meant = random_blocks(kind, rows=3, blocks=2)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("w", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = open_gguf(tmp_path / "x.gguf")[1]["w"]
    assert stored.shape == (3, len(meant[0]))
    whole = stored.read(slice(None), None)
    np.testing.assert_allclose(whole, np.asarray(meant), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(stored.read(np.array([2, 0]), slice(5, 40)), whole[[2, 0], 5:40])
    wrong = np.roll(np.asarray(meant), 1, axis=1)  # one place further
    assert np.abs(whole - wrong).max() > 0.1
