"""Parquet files as text: the column, the places, the refusals. pyarrow writes and reads them."""

import sys
import tracemalloc

import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.data.text import parquet as module
from jaxinterp.data.text.documents import Document, read_documents
from jaxinterp.data.text.sources import load_corpus
from jaxinterp.models.files.tokenizer import byte_tokenizer

pa = pytest.importorskip("pyarrow", reason="pyarrow, an extra, is not installed")
pq = pytest.importorskip("pyarrow.parquet")


def write(path, **options):
    """Three texts, an empty one, a missing one, and a column of numbers."""
    texts = ["one", "  ", None, "trois ☃", "four"]
    table = pa.table({"nested": [{"text": "no"}] * 5, "id": [1, 2, 3, 4, 5], "text": texts})
    pq.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "row_group_size": 2}, {"use_dictionary": False}])
def test_rows_of_the_text_column_are_documents(tmp_path, options, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 2)
    path = write(tmp_path / "a.parquet", **options)
    assert list(read_documents(path)) == [
        Document("one", f"{path}:1"),
        Document("trois ☃", f"{path}:4"),
        Document("four", f"{path}:5"),
    ]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_every_kind_of_text_column_is_read(tmp_path, kind):
    column = pa.array(["a", "b", "a"])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    pq.write_table(pa.table({"body": column}), tmp_path / "a.parquet")
    assert [document.text for document in read_documents(tmp_path / "a.parquet", text_field="body")] == ["a", "b", "a"]


def test_a_folder_may_hold_parquet_and_text(tmp_path):
    write(tmp_path / "b.parquet")
    (tmp_path / "a.txt").write_text("first")
    assert [document.text for document in read_documents(tmp_path)] == ["first", "one", "trois ☃", "four"]
    assert load_corpus(str(tmp_path), byte_tokenizer()).documents == 4


def test_a_wrong_column_is_named(tmp_path):
    path = write(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"text_field='txt'; its columns: 'nested', 'id', 'text'. Did you mean 'text'"):
        list(read_documents(path, text_field="txt"))
    with pytest.raises(UserError, match="column 'id' holds int64, where text is expected"):
        list(read_documents(path, text_field="id"))
    with pytest.raises(UserError, match="column 'nested' holds struct"):
        list(read_documents(path, text_field="nested"))


def test_what_is_no_parquet_or_was_damaged_is_refused(tmp_path):
    good = write(tmp_path / "good.parquet", compression="none", write_page_checksum=True).read_bytes()
    for name, content in {
        "empty": b"",
        "junk": b"PAR1" + b"junk" * 100,
        "cut": good[: len(good) // 2],
        "flipped": good.replace(b"four", b"fuor", 1),
    }.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.parquet is not a readable Parquet file"):
            list(read_documents(path))


def test_a_row_group_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")
    monkeypatch.setattr(module, "LARGEST_GROUP", 10)
    with pytest.raises(UserError, match=r"column 'text' of row group 0 would take .* write the file with smaller"):
        next(read_documents(path))


def test_a_text_that_many_rows_name_is_made_a_text_once_at_a_time(tmp_path):
    """A file of some hundred bytes stands for 512 MB."""
    table = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), pa.array(["x" * 2_000_000]))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": table}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1000
    before = pa.total_allocated_bytes()
    documents = read_documents(path)
    tracemalloc.start()
    try:
        assert len(next(documents).text) == 2_000_000
        taken = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
    finally:
        tracemalloc.stop()
    assert taken < 50_000_000
    assert sum(1 for _ in documents) == 255


def test_a_text_that_is_too_long_is_named_by_its_row(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")
    monkeypatch.setattr(module, "LONGEST_TEXT", 8)
    with pytest.raises(UserError, match=r"a\.parquet, row 4: a text of 9 bytes, more than 8: cut it"):
        list(read_documents(path))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a\.parquet: reading Parquet needs pyarrow: .*'jaxinterp\[parquet\]'"):
        list(read_documents(path))
