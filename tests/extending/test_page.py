"""docs/extending.md shows the code that is tested, word for word."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOWN = re.compile(r"\[`(tests/extending/\w+\.py)`\]\(\.\./\1\)\n\n```python\n(.*?)```", re.DOTALL)


def test_every_example_of_the_page_is_a_piece_of_its_file():
    shown = SHOWN.findall((ROOT / "docs/extending.md").read_text())
    files = {path.name for path in (ROOT / "tests/extending").glob("*.py")}
    tests = {name for name in files if name.startswith(("test_", "__"))}
    assert {Path(name).name for name, _ in shown} == files - tests, "all of them"
    for name, code in shown:
        assert code in (ROOT / name).read_text(), name


def test_no_file_of_the_package_knows_the_examples():
    names = ("Prototypes", "KMeans", "AMONG_TEN", "huber", "MultiplicativeUpdates", "WriteDirections")
    for path in (ROOT / "jaxinterp").rglob("*.py"):
        text = path.read_text()
        assert not any(re.search(rf"\b{name}\b", text) for name in names), path
