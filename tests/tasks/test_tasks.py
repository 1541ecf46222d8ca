"""Three people's tasks in at most ten lines of work each, run as they stand on the tiny model.

Each finds a feature for a concept, ablates it and shows the effect: of a transcoder trained this evening, of somebody's
dictionary of the residual stream, in text that comes out.
"""

import ast
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from jaxinterp import save
from jaxinterp.core.batch import Sites
from jaxinterp.decompositions.activations import TopK
from tests.helpers import random_dictionary

FOLDER = Path(__file__).parent
TASKS = ("student", "auditor", "writer")


def test_each_task_is_ten_lines():
    for name in TASKS:
        statements = ast.parse((FOLDER / f"{name}.py").read_text()).body
        work = [one for one in statements if not isinstance(one, ast.Import | ast.ImportFrom | ast.Expr)]
        assert len(work) <= 10, name


@pytest.mark.parametrize("name", [pytest.param("student", marks=pytest.mark.slow), "auditor", "writer"])
def test_a_task_runs_and_shows_an_effect(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if name != "student":
        given()
    values = runpy.run_path(str(FOLDER / f"{name}.py"))
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith(f"feature {values['feature']} ")
    assert 0 <= values["feature"] < 64 or name == "student"
    if name == "student":
        assert np.abs(values["effect"]).max() > 0 and all(
            "[[" in line for line in said if re.match(r"\d+\.?\d*  ", line)
        )
    if name == "auditor":
        assert np.abs(values["change"]).max() > 0
    if name == "writer":
        assert values["score"] > 0 and values["own"].tokens[0]


def given():
    """Two dictionaries with random directions, saved where the scripts look for them."""
    for folder, reads, writes in (
        ("dictionary", "blocks/1/resid/post", "blocks/1/resid/post"),
        ("transcoder", "blocks/1/mlp/in", "blocks/1/mlp/out"),
    ):
        save(random_dictionary(TopK(8), features=64, d_in=64, d_out=64, skip=False, sites=Sites(reads, writes)), folder)
