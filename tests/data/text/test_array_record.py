"""Array Record files as text: plain and JSON records, and what damage says."""

import functools
import json
import sys

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from jaxinterp.core.errors import UserError
from jaxinterp.data.text import array_record as module
from jaxinterp.data.text.documents import Document, read_documents
from jaxinterp.data.text.example_record import example_features

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


def test_numbered_files_of_tensorflow_datasets_are_read(tmp_path):
    names = [f"wiki-train.array_record-{index:05}-of-00002" for index in range(2)]
    for name in names:
        write(tmp_path / name, [name])
    (tmp_path / "wiki-train.array_record-notes").write_text("of another kind")
    assert [document.text for document in read_documents(tmp_path)] == names
    assert [document.text for document in read_documents(tmp_path / names[1])] == names[1:]


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
        ('{"text": "bad \\ud800 half"}', "field 'text' holds half a surrogate pair"),
        ("plain", "no JSON object, which the file's first record is"),
        ("[" * 100_000, "no JSON object"),
        (b"\xff", "no JSON object"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_number(tmp_path, record, message):
    path = write(tmp_path / "a.array_record", ['{"text": "fine"}', record])
    with pytest.raises(UserError, match=rf"a\.array_record, record 2: .*{message}"):
        list(read_documents(path))


def test_a_record_that_is_no_text_is_named(tmp_path):
    path = write(tmp_path / "a.array_record", ["fine", b"na\xefve"])
    with pytest.raises(UserError, match=r"a\.array_record, record 2: byte 3 is not UTF-8"):
        list(read_documents(path))


@functools.cache
def example_class():
    """`tf.train.Example` from its definition, made by the protocol buffers' own library."""
    label = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="made", syntax="proto3")

    def message(name, *fields, within=file.message_type):
        made = within.add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, 1):
            made.field.add(
                name=field,
                number=number,
                label=label.LABEL_REPEATED if repeated else label.LABEL_OPTIONAL,
                **({"type": kind} if isinstance(kind, int) else {"type": label.TYPE_MESSAGE, "type_name": kind}),
            )
        return made

    message("BytesList", ("value", label.TYPE_BYTES, True))
    message("FloatList", ("value", label.TYPE_FLOAT, True))
    message("Int64List", ("value", label.TYPE_INT64, True))
    lists = ("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")
    message("Feature", *((field, f".made.{kind}", False) for field, kind in lists))
    features = message("Features", ("feature", ".made.Features.FeatureEntry", True))
    entry = ("key", label.TYPE_STRING, False), ("value", ".made.Feature", False)
    message("FeatureEntry", *entry, within=features.nested_type).options.map_entry = True
    message("Example", ("features", ".made.Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("made.Example"))


def examples(*records):
    made = []
    for record in records:
        example = example_class()()
        for name, values in record.items():
            feature = example.features.feature[name]
            if isinstance(values[0], int):
                feature.int64_list.value.extend(values)
            elif isinstance(values[0], float):
                feature.float_list.value.extend(values)
            else:
                feature.bytes_list.value.extend(value.encode() for value in values)
        made.append(example.SerializeToString())
    return made


def test_records_of_tensorflow_datasets_are_read(tmp_path):
    records = examples(
        {"text": ["one " * 100], "id": [3], "score": [0.5]},
        {"text": ["trois ☃"], "id": [-1]},
        {"text": [""], "id": [0]},
    )
    path = write(tmp_path / "a.array_record", records)
    assert [document.text for document in read_documents(path)] == ["one " * 100, "trois ☃"]
    with pytest.raises(UserError, match="record 1: feature 'id' holds numbers, where one text is expected"):
        list(read_documents(path, text_field="id"))
    with pytest.raises(UserError, match=r"no field text_field='body'; its fields: '(text|id|score)'"):
        list(read_documents(path, text_field="body"))
    path = write(tmp_path / "b.array_record", [*examples({"text": ["a"]}), *examples({"text": ["a", "b"]})])
    with pytest.raises(UserError, match="record 2: feature 'text' holds 2 values"):
        list(read_documents(path))
    path = write(tmp_path / "c.array_record", [*examples({"text": ["a"]}), "plain"])
    with pytest.raises(UserError, match=r"record 2: no tf\.train\.Example"):
        list(read_documents(path))


@given(st.dictionaries(st.text(max_size=8), st.lists(st.text(), min_size=1, max_size=3), min_size=1, max_size=4))
def test_an_example_is_what_the_library_wrote(features):
    (record,) = examples(features)
    assert example_features(record) == {name: [text.encode() for text in texts] for name, texts in features.items()}


@given(st.binary(max_size=60))
def test_any_bytes_are_an_example_or_none(record):
    """Hostile lengths and endless numbers give None, and no error. What is one, the library reads as the same."""
    found = example_features(record)
    if found is not None:
        parsed = example_class().FromString(record).features.feature
        assert {*found} == {*parsed}


@pytest.mark.parametrize(
    "record", [b"", b"\n", b"\nplain text", b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x0a\xff\xff\xff\x7f"]
)
def test_what_only_begins_like_an_example_is_none(record):
    assert example_features(record) is None


def test_damage_is_told(tmp_path):
    good = write(tmp_path / "good.array_record", [f"text {index} " * 50 for index in range(500)]).read_bytes()
    middle = len(good) // 3
    for name, content, message in [
        ("empty", b"", "not a whole Array Record file"),
        ("junk", b"junk" * 1000, "not a whole Array Record file"),
        ("cut", good[: len(good) // 2], "not a whole Array Record file"),
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
