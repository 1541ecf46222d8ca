"""Fixtures of the tests of models."""

import shutil
from pathlib import Path

import pytest

from tests.models.model_files import GOLDENS


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the Llama golden, to be damaged."""
    return Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama"))
