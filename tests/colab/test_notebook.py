"""The Colab notebook runs from end to end, shows what its text promises, and is the same in both its forms.

`colab/first_steps.py` is the source. After an edit, make the notebook again:

    python -m tests.colab.test_notebook
"""

import re

import jupytext
import nbformat
import pytest

from tests.colab.notebooks import COLAB, execute, made_from, shown

SOURCE, NOTEBOOK = COLAB / "first_steps.py", COLAB / "first_steps.ipynb"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after it was executed."""
    return execute(NOTEBOOK, tmp_path_factory.mktemp("notebook"))


def test_the_two_forms_are_the_same():
    source = SOURCE.read_text(encoding="utf-8")
    assert NOTEBOOK.read_text(encoding="utf-8") == made_from(source), "run: python -m tests.colab.test_notebook"
    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(NOTEBOOK, as_version=4).cells]
    back = jupytext.reads(jupytext.writes(nbformat.read(NOTEBOOK, as_version=4), fmt="py:percent"), fmt="py:percent")
    assert cells == [(cell.cell_type, cell.source) for cell in back.cells]
    assert made_from(source + "\n# %%\nprint(1)\n") != made_from(source)


def test_nothing_went_wrong(executed):
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


def test_names_and_the_tree_are_shown(executed):
    names = shown(executed, 'sites(model, "blocks/*/mlp")')
    assert "['blocks/0/mlp', 'blocks/1/mlp', 'blocks/2/mlp', 'blocks/3/mlp']" in names
    assert "'blocks/1/mlp/hidden'" in names
    tree = shown(executed, "show(model)")
    assert "blocks/3/mlp  (site)" in tree and "blocks/0/mlp/up_proj/weight" in tree


def test_edits_change_the_prediction_and_rules_only_the_derivative(executed):
    divergences = re.findall(r"KL (\d\.\d+)", shown(executed, "ablated = forward("))
    assert len(divergences) == 2 and all(float(divergence) > 0 for divergence in divergences)
    lines = re.findall(r"logit (\S+), of it through blocks/1/mlp/out: (\S+)", shown(executed, "RELEVANCE}.items()"))
    (logit, gradient), (same_logit, relevance) = lines
    assert logit == same_logit and gradient != relevance


def test_the_transcoder_is_trained_and_scored(executed):
    progress = [float(fvu) for fvu in re.findall(r"tokens   FVU (\S+)", shown(executed, "def print_row"))]
    assert len(progress) == 5 and progress[-1] < 0.5 * progress[0]
    table = shown(executed, "rivals = baselines")
    fvu = {name.strip(): float(value) for name, value in re.findall(r"^([a-z][a-z ]{15})\s+(\d\.\d+)", table, re.M)}
    assert list(fvu) == ["skip transcoder", "neurons", "pca", "linear", "random features"]
    assert fvu["skip transcoder"] < 0.2
    assert fvu["skip transcoder"] < min(fvu["linear"], fvu["random features"])


def test_features_are_shown_with_their_contexts(executed):
    html = shown(executed, "feature_pages(")
    assert html.count("<tr>") == 7
    assert "rgba(255, 150, 0, 1.00)" in html and "cosine" in html


def test_the_transcoder_stands_in_the_mlp_s_place(executed):
    text = shown(executed, "replaced = replace(")
    assert (
        "['blocks/1/mlp/in', 'blocks/1/mlp/codes_pre', 'blocks/1/mlp/codes', 'blocks/1/mlp/out', 'blocks/1/mlp/added']"
        in text
    )
    replaced, ablated = map(float, re.findall(r"KL (\d\.\d+)", text))
    assert replaced < ablated


def test_the_new_objective_does_what_it_is_for(executed):
    lines = re.findall(r": FVU (\S+), effective features (\S+)", shown(executed, "make_batch("))
    (fvu, number), (other_fvu, other_number) = [tuple(map(float, line)) for line in lines]
    assert other_number < 0.6 * number
    assert max(fvu, other_fvu) < 0.25


if __name__ == "__main__":
    NOTEBOOK.write_text(made_from(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
