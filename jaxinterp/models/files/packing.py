"""What packed numbers mean: the formulas of AWQ, GPTQ and MXFP4, of arrays in memory; see `quantised.py`."""

import numpy as np
from jaxtyping import Float, Int, UInt8

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The 16 numbers of 4 bits: a sign, two bits of exponent, one of mantissa."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of a word's eight 4-bit pieces holds output 0, 1, ... 7 (AutoAWQ packs outputs 0 2 4 6 1 3 5 7)."""


def awq_codes(words: Int[np.ndarray, "rows words"]) -> UInt8[np.ndarray, "rows outputs"]:
    """The eight 4-bit numbers of every 32-bit word, in the order of the outputs."""
    numbers = pieces(words, 4).reshape(*words.shape, 8)
    return numbers[..., list(AWQ_ORDER)].reshape(words.shape[0], -1)


def affine(
    codes: UInt8[np.ndarray, "inputs outputs"],
    zeros: Int[np.ndarray, "groups outputs"] | UInt8[np.ndarray, "groups outputs"],
    scales: Float[np.ndarray, "groups outputs"],
    group: Int[np.ndarray, " inputs"],
) -> Float[np.ndarray, "outputs inputs"]:
    """(q - z) s of every input's group, as PyTorch lays a linear map out."""
    shifted = codes.astype(np.float32)
    shifted -= zeros.astype(np.float32)[group]
    shifted *= scales.astype(np.float32)[group]
    return shifted.T


def mxfp4(blocks: UInt8[np.ndarray, "*axes 16"], scales: UInt8[np.ndarray, "*axes"]) -> Float[np.ndarray, "*axes 32"]:
    """e2m1[q] 2^(s - 127); the lower half of a byte is the earlier number."""
    found = np.empty((*blocks.shape[:-1], 32), np.float32)
    found[..., 0::2] = E2M1[blocks & 15]
    found[..., 1::2] = E2M1[blocks >> 4]
    return np.ldexp(found, scales.astype(np.int32)[..., None] - 127)


def pieces(words: np.ndarray, bits: int) -> np.ndarray:
    """The numbers of `bits` bits in 32-bit words, lowest bits first: `[..., words]` -> `[..., 32 words / bits]`."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    whole = np.ascontiguousarray(words).view(np.uint32)
    found = (whole[..., None] >> shifts) & np.uint32(2**bits - 1)
    return found.astype(np.uint8).reshape(*words.shape[:-1], -1)
