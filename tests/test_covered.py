"""A check that is skipped because nothing changed covers what it says it covers."""

from pathlib import Path

import pytest

from tests import covered


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project of two files that one check covers."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1")
    (tmp_path / "y.txt").write_text("2")
    monkeypatch.setattr(covered, "ROOT", tmp_path)
    monkeypatch.setattr(covered, "NOTES", tmp_path / "covered.json")
    monkeypatch.setattr(covered, "COVERS", {"check": ("a", "y.txt")})
    return tmp_path


def said(capsys):
    covered.main("check")
    return capsys.readouterr().out.strip()


def change(path: Path):
    path.write_text("3")


def add(path: Path):
    path.with_name("new.py").write_text("")


def rename(path: Path):
    path.rename(path.with_name("renamed.py"))


@pytest.mark.parametrize("edit", [change, add, rename])
def test_a_change_is_seen(folder, capsys, edit):
    assert said(capsys) == "changed", "nothing was noted yet"
    covered.main("check", "--passed")
    assert said(capsys) == "unchanged"
    edit(folder / "a" / "x.py")
    assert said(capsys) == "changed"


def test_what_lies_elsewhere_and_caches_change_nothing(folder, capsys):
    covered.main("check", "--passed")
    (folder / "elsewhere.py").write_text("")
    (folder / "a" / "__pycache__").mkdir()
    (folder / "a" / "__pycache__" / "x.pyc").write_text("")
    assert said(capsys) == "unchanged"


def test_a_covered_name_that_does_not_exist_is_told(folder):
    (folder / "y.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"y\.txt"):
        covered.digest("check")


def test_the_checks_of_this_project_cover_files():
    assert all(len(covered.files(check)) > 3 for check in covered.COVERS)
