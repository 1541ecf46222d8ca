"""What the site makes of the repository's own pages: README is its home, BUILD.md and the notebooks are pages of it.

Links to files that are not pages (tests, sources) become their names: a site has no copy of them.
"""

import re
from pathlib import Path
from posixpath import normpath

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ("first_steps", "causes", "public_dictionary", "tpu")
GENERATED = {"index.md": "README.md", "build.md": "BUILD.md"}


def on_files(files: Files, config) -> Files:
    """Add the pages that are made of files outside docs/."""
    for page, source in GENERATED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for name in NOTEBOOKS:
        content = notebook_page((ROOT / "colab" / f"{name}.py").read_text())
        files.append(File.generated(config, f"notebooks/{name}.md", content=content))
    return files


def notebook_page(script: str) -> str:
    """Markdown of a notebook in its percent form: text cells as they are, code cells in fences."""
    parts = []
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        head, _, body = cell.partition("\n")
        if "[markdown]" in head:
            parts.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().split("\n")))
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Links in the site's own terms."""
    own = page.file.src_uri
    base = "" if own in GENERATED else f"docs/{own}".rpartition("/")[0]

    def link(found: re.Match) -> str:
        mark, text, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if "://" in target or not path:
            return found.group()
        whole = normpath(f"{base}/{path}" if base else path)
        pages = {source: made for made, source in GENERATED.items()}
        pages |= {f"colab/{name}.{form}": f"notebooks/{name}.md" for name in NOTEBOOKS for form in ("py", "ipynb")}
        inside = pages.get(whole) or (whole.removeprefix("docs/") if whole.startswith("docs/") else None)
        if inside is None:
            return text if text.startswith("`") else f"`{text}`"
        up = "../" * own.count("/")
        return f"{mark}[{text}]({up}{inside}{hash_}{anchor})"

    return re.sub(r"(!?)\[([^\]]+)\]\(([^)\s]+)\)", link, markdown)
