"""docs/invariants.md and the tests say the same: every test that it names exists and cites the number."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_invariant_names_tests_that_cite_it():
    text = (ROOT / "docs/invariants.md").read_text()
    entries = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\Z)", text, re.MULTILINE | re.DOTALL)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    for number, entry in entries:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", entry)
        assert named, f"invariant {number} names no test"
        for path, name in named:
            module = ast.parse((ROOT / path).read_text())
            functions = {node.name: node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"{path} has no {name}"
            cited = f"{ast.get_docstring(module) or ''} {ast.get_docstring(functions[name]) or ''}"
            assert re.search(rf"[Ii]nvariants? (?:[\d, and]*\b)?{number}\b", cited), f"{name} does not cite {number}"
