"""Documents that take seconds to read are kept between processes, and never believed where they are damaged."""

import os

import pytest

from jaxinterp.data.text import kept
from jaxinterp.data.text.corpora import installed_documentation
from jaxinterp.data.text.documents import Document

MADE = [Document("One text.\nÄ second line.", "a/1"), Document("Another.", "a/2")]


def texts(documents):
    return [(document.text, document.source) for document in documents]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINTERP_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def never():
    raise AssertionError("made again")


def test_they_are_made_once(folder):
    assert texts(kept.kept_documents("k", lambda: list(MADE))) == texts(MADE)
    assert texts(kept.kept_documents("k", never)) == texts(MADE)
    with pytest.raises(AssertionError, match="made again"):
        kept.kept_documents("another", never)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "binary", "not documents"])
def test_a_damaged_file_is_made_again(folder, damage):
    kept.kept_documents("k", lambda: list(MADE))
    (path,) = folder.glob("*.json")
    whole = path.read_bytes()
    other = b"0" * 64 + b"\n[1, 2]"
    path.write_bytes(
        {
            "cut": whole[:-3],
            "changed": whole.replace(b"One", b"Two"),
            "empty": b"",
            "binary": b"\xff\xfe",
            "not documents": other,
        }[damage]
    )
    assert texts(kept.kept_documents("k", lambda: list(MADE))) == texts(MADE)
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXINTERP_CACHE", str(tmp_path / "file" / "below"))
    assert texts(kept.kept_documents("k", lambda: list(MADE))) == texts(MADE)


def test_nothing_is_kept_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINTERP_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.cache_folder() is None
    kept.kept_documents("k", lambda: list(MADE))
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("JAXINTERP_CACHE")
    assert kept.cache_folder() == tmp_path / "jaxinterp"


def test_files_of_four_environments_are_kept(folder):
    for number in range(6):
        kept.kept_documents(f"k{number}", lambda: list(MADE))
        (path,) = folder.glob(f"*-k{number}.json")
        os.utime(path, (number, number))
    assert len(list(folder.glob("*.json"))) == kept.MOST
    kept.kept_documents("k5", never)


def test_the_key_follows_the_files(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("1")
    before = kept.key_of_files([path], "numpy")
    assert before == kept.key_of_files([path], "numpy") != kept.key_of_files([path], "scipy")
    path.write_text("12")
    assert kept.key_of_files([path], "numpy") != before


def test_the_documentation_is_the_same_read_anew_and_kept(folder, monkeypatch):
    packages = ("jaxtyping",)
    library = folder.parent / "library"
    library.mkdir()
    (library / "module.py").write_text(f'"""{"A sentence of plain English words. " * 9}"""')
    monkeypatch.setattr("jaxinterp.data.text.corpora._library", lambda: library)
    first = installed_documentation(packages)
    assert texts(installed_documentation(packages)) == texts(first)
    assert any(document.source == "python/module.py" for document in first)
    (library / "module.py").write_text(f'"""{"Other words in a plain English sentence. " * 9}"""')
    assert texts(installed_documentation(packages)) != texts(first), "a changed file is read anew"
