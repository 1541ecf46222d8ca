"""docs/start.md: its blocks run in order, its links exist; so do those of the other pages."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "start.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_blocks_of_the_start_page_run_in_order(capsys):
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "docs/start.md", "exec"), names)
    assert len(BLOCKS) >= 4
    assert names["row"]["fvu"] < 1.2 and bool((names["without"].logits != names["before"].logits).any())
    assert "unexplained variance" in capsys.readouterr().out


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link.split("#")[0]).exists()]
    assert not missing, missing
