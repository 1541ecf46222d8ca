"""Array Record files as text: plain and JSON records, and what damage says."""

import json
import sys

import pytest

from jaxinterp.data import array_record as module
from jaxinterp.data.documents import Document, read_documents
from jaxinterp.errors import UserError

writer = pytest.importorskip("array_record.python.array_record_module").ArrayRecordWriter


def write(path, records, group_size=3):
    made = writer(str(path), f"group_size:{group_size}")
    for record in records:
        made.write(record if isinstance(record, bytes) else record.encode())
    made.close()
    return path


@pytest.mark.parametrize("suffix", module.SUFFIXES)
@pytest.mark.parametrize("read_together", [2, 64])
def test_records_are_documents(tmp_path, monkeypatch, suffix, read_together):
    monkeypatch.setattr(module, "RECORDS", read_together)
    path = write(tmp_path / f"a{suffix}", ["one", " \n", "trois ☃", *(f"text {index}" for index in range(10))])
    documents = list(read_documents(path))
    assert documents[:2] == [Document("one", f"{path}:1"), Document("trois ☃", f"{path}:3")]
    assert [document.source for document in documents[2:]] == [f"{path}:{number}" for number in range(4, 14)]


def test_json_records_are_read_by_field(tmp_path):
    records = [json.dumps({"body": text, "id": 3}) for text in ("one", "two")]
    path = write(tmp_path / "a.array_record", records)
    assert [document.text for document in read_documents(path, text_field="body")] == ["one", "two"]


def test_text_that_looks_like_json_is_text_where_the_first_record_is(tmp_path):
    path = write(tmp_path / "a.array_record", ["plain", '{"text": 3}', "{not json"])
    assert [document.text for document in read_documents(path)] == ["plain", '{"text": 3}', "{not json"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"txt": "a"}', "no field text_field='text'; its fields: 'txt'"),
        ('{"text": 3}', "holds int, where text is expected"),
        ("plain", "no JSON object, which the file's first record is"),
        ("[" * 100_000, "no JSON object"),
        (b"\xff", "byte 1 is not UTF-8"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_number(tmp_path, record, message):
    path = write(tmp_path / "a.array_record", ['{"text": "fine"}', record])
    with pytest.raises(UserError, match=rf"a\.array_record, record 2: .*{message}"):
        list(read_documents(path))


def test_damage_is_told(tmp_path):
    good = write(tmp_path / "good.array_record", [f"text {index} " * 50 for index in range(500)]).read_bytes()
    middle = len(good) // 3
    for name, content, message in [
        ("empty", b"", "no whole Array Record file"),
        ("junk", b"junk" * 1000, "no whole Array Record file"),
        ("cut", good[: len(good) // 2], "no whole Array Record file"),
    ]:
        (tmp_path / f"{name}.array_record").write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.array_record.*{message}"):
            list(read_documents(tmp_path / f"{name}.array_record"))
    records = good.index(b"\x28\xb5\x2f\xfd", 200)  # the first group, compressed
    assert records < middle
    flipped = good[: records + 20] + bytes([good[records + 20] ^ 0xFF]) + good[records + 21 :]
    (tmp_path / "flipped.array_record").write_bytes(flipped)
    with pytest.raises(UserError, match=r"flipped\.array_record: records \d+ to \d+ are damaged"):
        list(read_documents(tmp_path / "flipped.array_record"))


def test_without_array_record_the_package_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.array_record", ["one"])
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    with pytest.raises(UserError, match="reading Array Record needs: python -m pip install array-record"):
        list(read_documents(path))
