"""Quantised weights of a Hugging Face folder, dequantised as they are read.

    fp8     w = q s[row // r, column // c]   q in float8, one scale a block of r x c
    awq     w = (q - z) s                    4 bits, groups of inputs; z and s one a group and output
    gptq    w = (q - z') s                   4 or 8 bits; z' = z + 1 mod 2^bits, `gptq_v2`: z; `g_idx`: the groups
    mxfp4   w = e2m1[q] 2^(s - 127)          4 bits, 32 numbers a scale (gpt-oss: experts)

`quantization_config` of a config.json says which. A packed matrix `X.weight` is offered under its own name, as the
matrix `(d_out, d_in)` that it packs; experts of gpt-oss as `(experts, d_in, d_out)`, as transformers holds them. Only
the rows and columns that are asked for are unpacked. What computes with rounded activations is not imitated: weights
are dequantised, activations stay as they are.

Sources: transformers 5.24 (integrations/finegrained_fp8.py, mxfp4.py; quantizers/); AutoAWQ's GEMM packing (Lin et al.
2023, arXiv 2306.00978); GPTQModel's linear layers (Frantar et al. 2022, arXiv 2210.17323); OCP Microscaling 1.0.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.models.files.packing import affine, awq_codes, mxfp4
from jaxinterp.models.files.packing import pieces as unpack
from jaxinterp.models.files.weights import Rows, StoredTensor

Tensors = Mapping[str, StoredTensor]

NO_EFFECT = {
    "fp8": ("activation_scheme", "dequantize", "ignored_layers", "scale_fmt"),
    "awq": ("backend", "do_fuse", "fuse_max_seq_len", "exllama_config", "modules_to_fuse"),
    "gptq": (
        *("desc_act", "sym", "damp_percent", "true_sequential", "static_groups", "model_name_or_path", "meta"),
        *("model_file_base_name", "lm_head", "dataset", "tokenizer", "backend", "use_exllama", "exllama_config"),
        *("max_input_length", "use_cuda_fp16", "module_name_preceding_first_block", "model_seqlen", "batch_size"),
        *("block_name_to_quantize", "pad_token_id", "cache_block_outputs", "quantizer", "damp_auto_increment"),
        *("hessian_chunk_size", "act_group_aware", "offload_to_disk", "pack_dtype", "is_marlin_format"),
        *("modules_in_block_to_quantize", "disable_exllama", "mse"),
    ),
    "mxfp4": ("dequantize",),
}
"""Fields that say how it was made or is computed, not what a packed number means."""


def without_quantisation(fields: Mapping[str, Json]) -> tuple[dict[str, Json], Mapping[str, Json] | None]:
    """The fields without `quantization_config`, and that one; None where nothing is quantised.

    Raises:
      UserError: the method is unknown or not supported, or a field of it is unknown.
    """
    rest = {name: value for name, value in fields.items() if name != "quantization_config"}
    said = fields.get("quantization_config")
    if not said:
        return rest, None
    kind = said.get("quant_method") if isinstance(said, dict) else said
    if not isinstance(said, dict) or not isinstance(kind, str) or kind not in METHODS:
        raise UserError(
            f"config field quantization_config.quant_method={kind!r} is not supported; supported: "
            f"{', '.join(METHODS)}. Take a checkpoint that is not quantised, or a GGUF file."
        )
    known = (*METHODS[kind][0], "quant_method", "modules_to_not_convert")
    for name, value in said.items():
        if name not in (*known, *NO_EFFECT[kind]):
            raise UserError(
                f"unknown config field quantization_config.{name}={value!r}; quant_method {kind!r} is supported with "
                f"{', '.join(known)}: a field that changes the numbers must not be ignored."
            )
    return rest, said


def unpacked(said: Mapping[str, Json] | None, tensors: Tensors, where: Path) -> dict[str, StoredTensor]:
    """Every packed matrix as the matrix that it packs; `said` is what `without_quantisation` gave.

    Raises:
      UserError: a field has a value that is not supported, or a scale is missing or of another shape.
    """
    if said is None:
        return dict(tensors)
    return METHODS[said["quant_method"]][1](said, dict(tensors), where)


def _fp8(said: Mapping[str, Json], tensors: dict[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    _require(said, "fmt", ("e4m3", "e5m2", None))
    block = said.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list | tuple) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise UserError(f"config field quantization_config.weight_block_size={block!r} should be two numbers or null.")
    for name in [name for name in tensors if tensors[name].kind.startswith("F8_")]:
        scales = [f"{name}_scale_inv", f"{name}_scale"]
        scale = next((tensors.pop(other) for other in scales if other in tensors), None)
        if scale is None:
            raise UserError(f"{where}: tensor {name!r} is in float8, and its scale {scales[0]!r} is missing.")
        tensors.pop(f"{name.removesuffix('weight')}activation_scale", None)
        tensors[name] = _scaled(tensors[name], scale, block)
    return tensors


def _scaled(weight: StoredTensor, scale: StoredTensor, block: Any) -> StoredTensor:
    """A float8 matrix times the scale of each block; one scale for all where there are no blocks."""
    shape = weight.shape
    if block is None:
        wanted: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1), (*shape[:1], 1))
    else:
        wanted = (tuple(-(-size // each) for size, each in zip(shape, block, strict=False)),)
    if scale.shape not in wanted or len(shape) != 2:
        raise UserError(
            f"{scale.file}: tensor {scale.name!r} has shape {list(scale.shape)}, but {weight.name!r} of shape "
            f"{list(shape)} in blocks of {block} calls for {list(wanted[-1])}."
        )

    def read(rows: Rows, columns: slice | None) -> np.ndarray:
        part = weight.read(rows, columns).astype(np.float32)
        scales = scale.read(slice(None), None).astype(np.float32)
        if block is None:
            part *= scales[rows] if scales.size > 1 else scales.reshape(())
            return part
        outputs = np.arange(shape[0])[rows] // block[0]
        inputs = np.arange(shape[1])[columns or slice(None)] // block[1]
        part *= scales[outputs][:, inputs]
        return part

    return replace(weight, read=read, refusal=scale.refusal)


def _awq(said: Mapping[str, Json], tensors: dict[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    _require(said, "bits", (4,))
    _require({"version": "gemm"} | dict(said), "version", ("gemm", "GEMM"))
    _require({"zero_point": True} | dict(said), "zero_point", (True,))
    for base in _packed(tensors):
        packed, zeros, scales = (_taken(tensors, f"{base}.{part}", where) for part in ("qweight", "qzeros", "scales"))
        inputs, words = _matrix(packed, "packed 4-bit numbers")
        outputs, size = 8 * words, _group(said, inputs, scales)
        _check(zeros, (-(-inputs // size), words))
        _check(scales, (-(-inputs // size), outputs))
        group = np.arange(inputs) // size

        def read(
            ours: np.ndarray,
            columns: slice,
            packed: StoredTensor = packed,
            zeros: StoredTensor = zeros,
            scales: StoredTensor = scales,
            group: np.ndarray = group,
        ) -> np.ndarray:
            near = slice(int(ours.min()) // 8, int(ours.max()) // 8 + 1) if len(ours) else slice(0, 0)
            within = ours - 8 * near.start
            codes = awq_codes(packed.read(columns, near))[:, within]
            zero = awq_codes(zeros.read(slice(None), near))[:, within]
            scale = scales.read(slice(None), None)[:, ours]
            return affine(codes, zero, scale, group[columns])

        tensors[f"{base}.weight"] = _linear(packed, f"{base}.weight", (outputs, inputs), read)
    return tensors


def _gptq(said: Mapping[str, Json], tensors: dict[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    bits = _require(said, "bits", (4, 8))
    version = _require({"checkpoint_format": "gptq"} | dict(said), "checkpoint_format", ("gptq", "gptq_v2"))
    offset, pieces = (1 if version == "gptq" else 0), 32 // bits
    for base in _packed(tensors):
        packed, zeros, scales = (_taken(tensors, f"{base}.{part}", where) for part in ("qweight", "qzeros", "scales"))
        words, outputs = _matrix(packed, f"packed {bits}-bit numbers")
        inputs = pieces * words
        size = _group(said, inputs, scales)
        groups = -(-inputs // size)
        _check(zeros, (groups, -(-outputs // pieces)))
        _check(scales, (groups, outputs))
        group = np.arange(inputs) // size
        if f"{base}.g_idx" in tensors:
            index = tensors.pop(f"{base}.g_idx")
            _check(index, (inputs,))
            group = index.read(slice(None), None).astype(np.int64)
            if group.size and not (group.min() >= 0 and group.max() < groups):
                raise UserError(f"{where}: tensor {index.name!r} names groups that are not there ({groups} are).")

        def read(
            ours: np.ndarray,
            columns: slice,
            packed: StoredTensor = packed,
            zeros: StoredTensor = zeros,
            scales: StoredTensor = scales,
            group: np.ndarray = group,
        ) -> np.ndarray:
            start, stop, _ = columns.indices(pieces * packed.shape[0])
            rows = slice(start // pieces, -(-stop // pieces))
            codes = unpack(packed.read(rows, slice(None))[:, ours].T, bits).T[start - rows.start * pieces :]
            zero = (unpack(zeros.read(slice(None), None), bits)[:, ours] + np.uint8(offset)) & np.uint8(2**bits - 1)
            return affine(codes[: stop - start], zero, scales.read(slice(None), None)[:, ours], group[columns])

        tensors[f"{base}.weight"] = _linear(packed, f"{base}.weight", (outputs, inputs), read)
    return tensors


def _mxfp4(said: Mapping[str, Json], tensors: dict[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    for name in [name for name in tensors if name.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        blocks, scales = tensors.pop(name), _taken(tensors, f"{base}_scales", where)
        if blocks.kind != "U8" or len(blocks.shape) != 4 or blocks.shape[-1] != 16 or scales.kind != "U8":
            raise UserError(
                f"{where}: tensor {name!r} of type {blocks.kind} and shape {list(blocks.shape)} should be bytes "
                "[experts, d_out, groups, 16], with a byte a group for scales."
            )
        experts, outputs, groups, _ = blocks.shape
        _check(scales, (experts, outputs, groups))
        shape = (experts, 32 * groups, outputs)

        def read(
            rows: Rows,
            columns: slice | None,
            blocks: StoredTensor = blocks,
            scales: StoredTensor = scales,
            shape: tuple[int, ...] = shape,
        ) -> np.ndarray:
            numbers = np.arange(shape[0])[rows]
            columns = columns or slice(None)
            found = np.empty((len(numbers), len(range(*columns.indices(shape[1]))), shape[2]), np.float32)
            for at, expert in enumerate(numbers):  # one expert at a time, for the memory's sake
                one = slice(int(expert), int(expert) + 1)
                whole = mxfp4(blocks.read(one, None)[0], scales.read(one, None)[0])
                found[at] = whole.reshape(shape[2], shape[1]).T[columns]
            return found

        tensors[base] = StoredTensor(base, blocks.file, shape, read, kind="MXFP4")
    return tensors


METHODS: dict[str, tuple[tuple[str, ...], Callable[..., dict[str, StoredTensor]]]] = {
    "fp8": (("fmt", "weight_block_size"), _fp8),
    "awq": (("bits", "group_size", "version", "zero_point"), _awq),
    "gptq": (("bits", "group_size", "checkpoint_format"), _gptq),
    "mxfp4": ((), _mxfp4),
}
"""By `quant_method`: the fields that it reads, and what unpacks."""


def _linear(
    packed: StoredTensor, name: str, shape: tuple[int, int], read: Callable[[np.ndarray, slice], np.ndarray]
) -> StoredTensor:
    """The matrix `(d_out, d_in)` whose rows and columns `read` unpacks."""

    def rows_of(rows: Rows, columns: slice | None) -> np.ndarray:
        return read(np.arange(shape[0])[rows], columns or slice(None))

    return StoredTensor(name, packed.file, shape, rows_of, kind=packed.kind)


def _packed(tensors: Mapping[str, StoredTensor]) -> list[str]:
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


def _taken(tensors: dict[str, StoredTensor], name: str, where: Path) -> StoredTensor:
    if name not in tensors:
        raise UserError(f"{where}: tensor {name!r} of a quantised matrix is missing.")
    return tensors.pop(name)


def _matrix(packed: StoredTensor, what: str) -> tuple[int, int]:
    if packed.kind not in ("I32", "U32") or len(packed.shape) != 2:
        raise UserError(
            f"{packed.file}: tensor {packed.name!r} of type {packed.kind} and shape {list(packed.shape)} should be a "
            f"matrix of 32-bit words with {what}."
        )
    return packed.shape[0], packed.shape[1]


def _check(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, expected {list(shape)}: it does "
            "not belong to the packed matrix beside it."
        )


def _group(said: Mapping[str, Json], inputs: int, scales: StoredTensor) -> int:
    """Inputs that share a scale; -1: all."""
    size = said.get("group_size")
    if type(size) is not int or not (size == -1 or size > 0):
        raise UserError(f"config field quantization_config.group_size={size!r} should be a positive number, or -1.")
    if scales.refusal is not None:
        raise UserError(f"{scales.file}: tensor {scales.name!r} {scales.refusal}")
    return inputs if size == -1 else size


def _require(said: Mapping[str, Json], name: str, allowed: tuple[Json, ...]) -> Any:
    value = said.get(name)
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise UserError(
            f"config field quantization_config.{name}={value!r} is not supported; supported: "
            f"{', '.join(map(repr, allowed))}."
        )
    return value
