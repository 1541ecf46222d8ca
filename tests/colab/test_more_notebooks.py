"""The notebooks about public dictionaries and TPUs run from end to end and show what they promise.

`colab/*.py` are the sources. After an edit, make the notebooks again:

    python -m tests.colab.test_more_notebooks
"""

import re

import pytest

from tests.colab.notebooks import COLAB, execute, made_from, shown

NAMES = ("public_dictionary", "tpu")

pytestmark = pytest.mark.slow


def made(name):
    return made_from((COLAB / f"{name}.py").read_text(encoding="utf-8"), name.replace("_", "-"))


@pytest.mark.parametrize("name", NAMES)
def test_the_two_forms_are_the_same(name):
    assert (COLAB / f"{name}.ipynb").read_text(encoding="utf-8") == made(name), (
        "run: python -m tests.colab.test_more_notebooks"
    )


def test_from_a_public_dictionary_to_steering(tmp_path):
    notebook = execute(COLAB / "public_dictionary.ipynb", tmp_path)
    assert "Dictionary 128 features" in shown(notebook, "dictionary = read(")
    fvu = float(re.search(r"^FVU (\S+),", shown(notebook, "dictionary = read("), re.MULTILINE)[1])
    assert fvu < 0.9
    lines = shown(notebook, "without = run(")
    assert float(re.search(r"change by at most (\S+)", lines)[1]) > 0
    costs = [float(cost) for cost in re.findall(r"KL (\S+),", lines)]
    assert len(costs) == 4 and all(abs(sum(pair) / 2 - 0.1) < 0.01 for pair in (costs[:2], costs[2:])), "equal cost"
    assert "plain: " in lines and "steered: " in lines


def test_over_all_devices_stopped_and_resumed(tmp_path):
    notebook = execute(COLAB / "tpu.ipynb", tmp_path)
    assert "it fits" in shown(notebook, "fits = announce(")
    lines = shown(notebook, "class Stop").split("\n")
    assert "stopped" in lines and "the same bits: True" in lines
    assert float(re.search(r"FVU (\S+),", shown(notebook, "row = score("))[1]) < 1


if __name__ == "__main__":
    for name in NAMES:
        (COLAB / f"{name}.ipynb").write_text(made(name), encoding="utf-8")
