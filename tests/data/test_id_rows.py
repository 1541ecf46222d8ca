"""What others accept: null texts, rows of token ids, ids without a tokenizer."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.data.text.documents import read_documents, read_rows
from jaxinterp.data.text.load_text import load_text
from jaxinterp.data.text.sources import load_corpus
from jaxinterp.data.token_files import read_token_file
from jaxinterp.models.files.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
ROWS = [[10 + row] * (4 + row) for row in range(3)]


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ids_of(corpus):
    return [corpus.document(index).tolist() for index in range(corpus.documents)]


def test_a_null_text_is_passed_over_as_in_parquet(tmp_path):
    texts = ["one", None, "two", None]
    lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert [document.text for document in read_documents(tmp_path / name)] == ["one", "two"]
    lines(tmp_path / "first.jsonl", [{"text": None}, {"text": "one"}])
    assert [document.source for document in read_documents(tmp_path / "first.jsonl")] == [
        f"{tmp_path / 'first.jsonl'}:2"
    ]
    with pytest.raises(UserError, match="holds no text"):
        list(read_documents(lines(tmp_path / "none.jsonl", [{"text": None}])))
    with pytest.raises(UserError, match="line 1: no field text_field='txt'"):  # a typing error is still found
        list(read_documents(tmp_path / "a.jsonl", text_field="txt"))


@pytest.mark.parametrize("column", ["input_ids", "tokens"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_ids_are_documents(tmp_path, kind, column):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        lines(path, [{column: row} for row in [*ROWS, None, []]])
    else:
        pyarrow.parquet.write_table(pyarrow.table({column: [*ROWS, None, []]}), path)
    corpus = load_corpus(str(path), BYTES)
    assert ids_of(corpus) == ROWS and corpus.special == {256}
    again = load_corpus(str(path), None, cache=tmp_path / "cache")
    assert ids_of(again) == ROWS and again.special == frozenset()
    assert np.array_equal(again.keys, corpus.keys)
    with pytest.raises(UserError, match="it holds token ids, where text is expected"):
        list(read_documents(path))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_padding_is_left_out_where_a_mask_says_so(tmp_path, kind):
    table = {"input_ids": [[7, 8, 0, 0], [0, 9, 9, 9]], "attention_mask": [[1, 1, 0, 0], [0, 1, 1, 1]]}
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        lines(path, [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)])
    else:
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert ids_of(load_corpus(str(path), BYTES)) == [[7, 8], [9, 9, 9]]


def test_a_row_is_cut_behind_end_tokens_and_a_text_goes_before_ids(tmp_path):
    lines(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 256, 3]}])
    assert ids_of(load_corpus(str(tmp_path / "a.jsonl"), BYTES)) == [[1, 2, 256], [3]]
    lines(tmp_path / "b.jsonl", [{"input_ids": [1, 2], "text": "a"}])
    assert ids_of(load_corpus(str(tmp_path / "b.jsonl"), BYTES)) == [[97, 256]]
    assert [row.ids.tolist() for row in read_rows(tmp_path / "b.jsonl", text_field="input_ids")] == [[1, 2]]


@pytest.mark.parametrize(
    ("row", "message"),
    [([1, -100], "-100 at position 1 is not a token id"), ([1, 2.5], "list of token ids"), ([1, 300], "300 is not in")],
)
def test_what_is_no_id_is_refused_by_file_and_line(tmp_path, row, message):
    path = lines(tmp_path / "a.jsonl", [{"input_ids": row}])
    with pytest.raises(UserError, match=rf"a\.jsonl.*{message}"):
        load_corpus(str(path), BYTES)


def test_an_npy_file_of_two_axes_is_rows(tmp_path):
    ids = np.arange(12).reshape(3, 4) + 1
    ids[1, 1] = 256
    np.save(tmp_path / "a.npy", ids.astype(np.int64))
    rows = [[1, 2, 3, 4], [5, 256], [7, 8], [9, 10, 11, 12]]
    assert ids_of(read_token_file(tmp_path / "a.npy", BYTES)) == rows
    assert ids_of(read_token_file(tmp_path / "a.npy", None)) == ids.tolist()
    assert ids_of(read_token_file(tmp_path / "a.npy", BYTES, max_tokens=6)) == rows[:2]


def test_ids_need_no_tokenizer_and_a_text_does(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(1, 250, (40, 100)))
    train, heldout = load_text(str(tmp_path / "a.npy"), None, seq=50, heldout=0.3)
    assert len(train) + len(heldout) == 80 and train[0]["weight"].tolist() == [0.0] + [1.0] * 49
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="without a tokenizer"):
        load_text(str(tmp_path / "a.txt"), None)
    np.arange(99, dtype=np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match="pass token_dtype="):
        load_text(str(tmp_path / "a.bin"), None)
    assert read_token_file(tmp_path / "a.bin", None, token_dtype="uint16").tokens == 99
