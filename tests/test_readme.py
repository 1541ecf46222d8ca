"""The README says what is true: its objective is the tested one, its names exist, its commands are targets."""

import ast
import re
from pathlib import Path

import jaxinterp
from jaxinterp import methods

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def without_docstring(source):
    tree = ast.parse(source)
    if isinstance(tree.body[0], ast.Expr):
        del tree.body[0]
    return ast.dump(tree)


def test_the_objective_in_the_readme_is_the_one_that_is_tested():
    tested = (ROOT / "tests/training/objective_in_one_file.py").read_text()
    assert without_docstring(tested) in [without_docstring(block) for block in PYTHON]


def test_every_name_that_the_readme_imports_exists():
    imported = [node for block in PYTHON for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert len(imported) >= 3
    modules = {"jaxinterp": jaxinterp, "jaxinterp.methods": methods, "jaxinterp.objectives": jaxinterp.objectives}
    for node in imported:
        assert all(hasattr(modules[node.module], alias.name) for alias in node.names), ast.dump(node)


def test_the_commands_and_links_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(?:.*`)?make (\w+)(?:`|  )", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link.split("#")[0]).exists() for link in links)
