"""Damaged safetensors files are refused before anything is allocated; layouts are read lazily."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.files.weights import Layout, StoredTensor, read_leaf
from jaxinterp.models.load import load
from tests.models.model_files import GOLDENS, edit_header


@pytest.mark.parametrize("order", ["stored", "stacked", "interleaved", "rotary_pairs"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_part_of_a_leaf_is_that_part_of_the_whole(order: Any, transposed: bool) -> None:
    sizes = (24, 16, 16) if order == "stacked" else ()
    layout = Layout(transposed, order, part=1 if order in ("stacked", "interleaved") else 0, sizes=sizes)
    rng = np.random.default_rng(0)
    for shape in [(6, 16), (16,)]:
        file_array = rng.standard_normal(
            layout.file_shape(shape) if len(shape) == 2 else layout.file_shape(shape)[::-1]
        )
        read_sizes: list[int] = []

        def read(rows: Any, columns: Any, file_array: Any = file_array, sizes: list[int] = read_sizes) -> Any:
            part = file_array[rows] if columns is None else file_array[rows, columns]
            sizes.append(part.size)
            return part.copy()

        stored = StoredTensor("x", Path("x"), file_array.shape, read)
        whole = read_leaf(stored, layout, (slice(None),) * len(shape), shape, head_dim=4)
        assert whole.shape == shape
        for both in [(slice(2, 5), slice(3, 11)), (slice(0, 3), slice(8, 16))]:
            index = both[-len(shape) :]
            part = read_leaf(stored, layout, index, shape, head_dim=4)
            np.testing.assert_array_equal(part, whole[index])
            if layout.transposed or order in ("stored", "stacked"):
                assert read_sizes[-1] == part.size  # nothing else was touched


def test_layouts_say_where_things_are() -> None:
    """Query, key and value of two heads of size 4, as each family stores them."""
    outputs = lambda layout: np.arange(24)[layout.file_outputs(0, 8, 8, 4)].tolist()
    assert outputs(Layout(order="stacked", part=1, sizes=(8, 8, 8))) == [8, 9, 10, 11, 12, 13, 14, 15]
    assert outputs(Layout(order="stacked", part=1, sizes=(16, 8, 8))) == [16, 17, 18, 19, 20, 21, 22, 23]
    assert outputs(Layout(order="interleaved", part=1)) == [4, 5, 6, 7, 16, 17, 18, 19]
    assert outputs(Layout(order="rotary_pairs")) == [0, 2, 1, 3, 4, 6, 5, 7]


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h[NORM].update(data_offsets=[0, 64]), r"tensor '.*' overlaps the tensor before it"),
        (lambda h: h.pop(NORM), r"leaves a gap before it|bytes after the last tensor"),
        (lambda h: h[NORM].update(shape=[17]), r"'model\.norm\.weight' of shape \[17\] .* needs 68 bytes"),
        (lambda h: h[NORM].update(shape=[2**40, 2**20]), r"'model\.norm\.weight' of shape .* needs \d+ bytes"),
        (lambda h: h[NORM].update(shape=[-16]), r"'model\.norm\.weight' has a malformed header entry"),
        (lambda h: h[NORM].update(shape="16"), r"'model\.norm\.weight' has a malformed header entry"),
        (lambda h: h[NORM].update(dtype="F4"), r"'model\.norm\.weight' has unknown type 'F4'"),
        (lambda h: h.update({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [10**6, 10**6 + 2**42]}}), "'x'"),
        (lambda h: h.update(x=None), r"tensor 'x' has a malformed header entry"),
    ],
)
def test_damaged_headers_are_refused(edit: Any, message: str, golden: Path) -> None:
    edit_header(golden, edit)
    with pytest.raises(UserError, match=message):
        load(golden)


def test_truncated_files_are_refused(golden: Path) -> None:
    path = golden / "model.safetensors"
    raw = path.read_bytes()
    header = struct.unpack("<Q", raw[:8])[0]
    for kept in [0, 4, 8, header // 2, 8 + header, len(raw) // 2, len(raw) - 1]:
        path.write_bytes(raw[:kept])
        with pytest.raises(UserError, match=r"model\.safetensors: .*truncated"):
            load(golden)
    path.write_bytes(raw + b"x")
    with pytest.raises(UserError, match="1 bytes after the last tensor"):
        load(golden)
    path.write_bytes(struct.pack("<Q", 2**60) + raw[8:])
    with pytest.raises(UserError, match="the header would take 1152921504606846976 bytes"):
        load(golden)
    path.write_bytes(raw[:8] + b"?" + raw[9:])
    with pytest.raises(UserError, match="header is not a JSON object"):
        load(golden)


def test_sharded_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(GOLDENS / "llama-llama3", tmp_path / "llama3"))
    index = directory / "model.safetensors.index.json"
    original = json.loads(index.read_text())
    first, *_, last = sorted(set(original["weight_map"].values()))

    def with_map(**changes: Any) -> None:
        index.write_text(json.dumps({"weight_map": original["weight_map"] | changes}))

    with_map(**{"lm_head.weight": "../secret.safetensors"})
    with pytest.raises(
        UserError, match=r"'lm_head\.weight' to '\.\./secret\.safetensors', which is not a plain file name"
    ):
        load(directory)
    with_map(extra=first)
    with pytest.raises(UserError, match=rf"says that '{first}' holds tensor 'extra'; it does not"):
        load(directory)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in original["weight_map"].items() if k != NORM}}))
    with pytest.raises(UserError, match=r"holds tensor 'model\.norm\.weight', which .* puts elsewhere"):
        load(directory)
    index.write_text("{}")
    with pytest.raises(UserError, match="no readable weight_map"):
        load(directory)
    with_map()
    (directory / last).unlink()
    with pytest.raises(UserError, match=rf"names '{last}', which is not in"):
        load(directory)
