"""The notebook from a prompt to a graph to an intervention to text runs from end to end and shows what it promises.

`colab/causes.py` is the source. After an edit, make the notebook again:

    python -m tests.colab.test_causes_notebook
"""

import re

import pytest

from tests.colab.notebooks import COLAB, execute, made_from, shown

SOURCE, NOTEBOOK = COLAB / "causes.py", COLAB / "causes.ipynb"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    return execute(NOTEBOOK, tmp_path_factory.mktemp("causes"))


def test_the_two_forms_are_the_same():
    source = SOURCE.read_text(encoding="utf-8")
    assert NOTEBOOK.read_text(encoding="utf-8") == made_from(source, "causes"), (
        "run: python -m tests.colab.test_causes_notebook"
    )


def test_from_a_prompt_to_a_graph_to_an_intervention_to_text(executed):
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    graph = shown(executed, "captured = capture(")
    active, kept = map(int, re.match(r"(\d+) features are active, (\d+) of", graph).groups())
    assert active > 10 and kept > 3
    assert float(re.search(r"missed by (\S+);", graph)[1]) < 1e-4, "the sum rule"
    assert re.search(r"graph.html: \d+ nodes, [1-9]\d* links", shown(executed, "write_graph_page(graph"))
    lines = re.findall(r"changes by (\S+), predicted (\S+)", shown(executed, "for mode in"))
    frozen, predicted = map(float, lines[0])
    assert abs(predicted) > 0 and abs(frozen - predicted) < 0.5 * abs(predicted) + 1e-3
    own = re.findall(r"own text: (\w+)", shown(executed, "class Scaled"))
    assert own[0] == "True" and "False" in own[1:], "unchanged without an edit; another text with one"


if __name__ == "__main__":
    NOTEBOOK.write_text(made_from(SOURCE.read_text(encoding="utf-8"), "causes"), encoding="utf-8")
