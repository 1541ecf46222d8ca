"""The notebooks' first cell on a machine without jaxinterp: what it installs, what it says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

COLAB = Path(__file__).parents[2] / "colab"


@pytest.fixture(params=["first_steps", "causes", "public_dictionary", "tpu"])
def first_cell(request, monkeypatch, tmp_path):
    """Runs the cell in a folder; the words after `pip install --quiet`."""
    notebook = nbformat.read(COLAB / f"{request.param}.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")

    def run(folder, source="", installed=False):
        asked = []
        monkeypatch.chdir(folder)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
        monkeypatch.setattr(subprocess, "run", lambda words, check: asked.append(words))
        exec(cell.source.replace('SOURCE = ""', f"SOURCE = {source!r}", 1), {})
        assert all(words[:5] == [sys.executable, "-m", "pip", "install", "--quiet"] for words in asked)
        return [word for words in asked for word in words[5:]]

    return run


def test_where_it_is_installed_nothing_is_done(first_cell, tmp_path):
    assert first_cell(tmp_path, installed=True) == []


def test_the_clone_around_the_notebook_is_installed(first_cell):
    assert first_cell(COLAB) == [str(COLAB.parent)]


def test_a_wheel_beside_it_is_installed(first_cell, tmp_path):
    (tmp_path / "jaxinterp-0.1.0-py3-none-any.whl").touch()
    assert first_cell(tmp_path) == [str(tmp_path / "jaxinterp-0.1.0-py3-none-any.whl")]


def test_an_address_comes_first(first_cell):
    assert first_cell(COLAB, source="git+https://example.org/jaxinterp") == ["git+https://example.org/jaxinterp"]


def test_nothing_found_is_one_sentence_with_three_ways(first_cell, tmp_path):
    """A folder called jaxinterp alone is no clone."""
    (tmp_path / "jaxinterp").mkdir()
    with pytest.raises(SystemExit, match=r"not installed.*SOURCE.*inside a clone.*upload"):
        first_cell(tmp_path)
