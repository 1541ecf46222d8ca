import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinterp.core.errors import UserError
from jaxinterp.data.text import documents as module
from jaxinterp.data.text.documents import Document, cut, read_documents


def texts(documents):
    return [document.text for document in documents]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_the_key_depends_on_the_text_alone():
    digest = hashlib.sha256("naïve".encode()).digest()
    assert Document("naïve", "a").key == int.from_bytes(digest[-8:], "big") == Document("naïve", "b").key
    assert Document("naive", "a").key != Document("naïve", "a").key


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\n\r\nFirst.\r\n\r\nSecond.\r\n")
    (document,) = read_documents(path)
    assert document == Document("First.\n\nSecond.", f"{path}:3")


def test_separator_lines_divide_a_text_file(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("One.\n<|endoftext|>\nTwo.\n\n<|endoftext|>\n<|endoftext|>\nThree.\n<|endoftext|>\n")
    assert texts(read_documents(path)) == ["One.", "Two.", "Three."]
    assert [document.source for document in read_documents(path)] == [f"{path}:{line}" for line in (1, 3, 7)]


@given(st.lists(st.integers(1, 900), min_size=1, max_size=60))
def test_cutting_a_long_text_keeps_every_line(lengths):
    """Pieces end at blank lines, none is longer than two pieces and a line, and no text is lost."""
    lines = [f"{index}:{'x' * length}\n" for index, length in enumerate(lengths)]
    numbered = [(number, line) for number, line in enumerate([part for line in lines for part in (line, "\n")], 1)]
    pieces = texts(cut(numbered, "long"))
    assert [line for piece in pieces for line in piece.split("\n") if line] == [line.strip() for line in lines]
    assert all(len(piece) + 4 >= module.PIECE for piece in pieces[:-1])
    assert all(len(piece) <= 2 * module.PIECE + 1000 for piece in pieces)


def test_a_text_without_blank_lines_is_cut_all_the_same():
    pieces = texts(cut(((number, "y" * 99 + "\n") for number in range(1, 501)), "long"))
    assert len(pieces) > 2 and sum(piece.count("y") for piece in pieces) == 500 * 99


def test_jsonl_reads_the_named_field_and_skips_empty_texts(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"body": "one", "text": 3}, {"body": " \n"}, {"body": "trois ☃"}])
    with path.open("a") as file:
        file.write("\n")
    assert list(read_documents(path, text_field="body")) == [
        Document("one", f"{path}:1"),
        Document("trois ☃", f"{path}:3"),
    ]


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "sub").mkdir()
    write_lines(tmp_path / "sub" / "c.jsonl", [{"text": "third"}, {"text": "fourth"}])
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "README.md").write_text("not read")
    assert texts(read_documents(tmp_path)) == ["first", "second", "third", "fourth"]


def test_reading_is_lazy(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "good"}, {"wrong": "bad"}])
    stream = read_documents(path)
    assert next(stream).text == "good"
    with pytest.raises(UserError, match="line 2"):
        next(stream)


def test_a_missing_path_is_told_at_once_with_the_nearest_name(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(UserError, match=r"corpsu\.txt.*Did you mean 'corpus\.txt'"):
        read_documents(tmp_path / "corpsu.txt")
    with pytest.raises(UserError, match=r"nowhere"):
        read_documents(tmp_path / "nowhere" / "a.txt")


def test_other_kinds_of_file_and_barren_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.txt or \.jsonl"):
        read_documents(tmp_path)
    (tmp_path / "table.csv").write_text("text")
    with pytest.raises(UserError, match=r"table\.csv.*\.csv.*\.jsonl"):
        read_documents(tmp_path / "table.csv")


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("b.txt", " \n\n"), ("c.jsonl", '{"text": ""}\n')])
def test_an_empty_source_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is empty"):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "half', "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b'["text"]', "JSON object is expected, not list"),
        (b'{"txt": "a", "id": 3}', r"no field text_field='text'; its fields: 'txt', 'id'"),
        (b"{}", "its fields: none"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "byte 11 is not UTF-8"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 3: .*{message}"):
        list(read_documents(path))


def test_bytes_that_are_no_utf8_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("fine\nna\u00efve\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt, line 2: byte 3"):
        list(read_documents(path))


def test_a_line_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_LINE", 100)
    path = tmp_path / "long.txt"
    path.write_text("x" * 100 + "\n")
    with pytest.raises(UserError, match=r"long\.txt, line 1: longer than 100 bytes"):
        list(read_documents(path))


def test_hidden_files_are_passed_over(tmp_path):
    """Kind K: what notebooks and file managers leave behind was trained on."""
    for name in ("a.txt", "sub/b.txt", ".c.txt", "._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "sub/.git/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(read_documents(tmp_path)) == ["a.txt", "sub/b.txt"]
    hidden = tmp_path / ".ipynb_checkpoints"  # a folder or file that is named by the user is read
    assert texts(read_documents(hidden)) == [".ipynb_checkpoints/a-checkpoint.txt"]
    assert texts(read_documents(tmp_path / ".c.txt")) == [".c.txt"]


def test_a_folder_of_hidden_files_alone_holds_no_text(tmp_path):
    (tmp_path / "._x.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="holds no"):
        list(read_documents(tmp_path))
