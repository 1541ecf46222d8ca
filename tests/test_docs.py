"""The pages of docs/: their blocks run in order, their links exist, and the site's navigation has every page."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
RUN = ("start", "edits", "bring", "circuits", "steering", "scale")
"""Pages whose blocks run here; those of extending.md, adapters.md and README have tests of their own."""


def run_blocks(page: str) -> dict:
    """The names that the blocks of a page leave behind, run in order."""
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert blocks, page
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run_in_order(page, capsys):
    names = run_blocks(page)
    shown = capsys.readouterr().out
    if page == "start":
        assert names["row"]["fvu"] < 1.2 and bool((names["without"].logits != names["before"].logits).any())
        assert "unexplained variance" in shown
    if page == "circuits":
        assert all(abs(float(e.sum())) > 0 for e in names["effects"].values())
    if page == "steering":
        assert bool(names["strength"].converged) and "difference in means" in shown


def test_every_page_with_python_is_run_somewhere():
    elsewhere = {"extending", "adapters", "interchange"}  # tests/extending, test_adapters_page; needs published files
    with_python = {page.stem for page in DOCS.glob("*.md") if "```python" in page.read_text()}
    assert with_python <= {*RUN, *elsewhere}


def test_the_site_has_every_page():
    listed = set(re.findall(r": ([\w/]+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    made = {"index.md", "build.md", *(f"notebooks/{source.stem}.md" for source in (DOCS.parent / "colab").glob("*.py"))}
    assert listed - made == {page for page in pages if not page.startswith(("evidence/", "oracles/"))}


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link.split("#")[0]).exists()]
    assert not missing, missing
