"""Whether what a long check covers has changed since the check last passed.

    python tests/covered.py parity            prints "changed" or "unchanged"
    python tests/covered.py parity --passed   notes in tests/covered.json that the check passed on these files

A check that makes the goldens again with other libraries is repeated in CI only where a file below changed; the suite
compares with the committed goldens every time. `make parity`, `peers`, `tracer`, `browser`, `explorer`, `frontend`,
`site`, `test-tpu` and `test-gpu` note that they passed.
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTES = ROOT / "tests" / "covered.json"

COVERS = {
    "parity": ("tests/parity", "jaxinterp/models/files/write_huggingface.py", "constraints.txt"),
    "peers": (
        "tests/interchange",
        "jaxinterp/interchange",
        "jaxinterp/decompositions",
        "constraints.txt",
    ),
    "tracer": (
        "tests/interchange",
        "jaxinterp/interchange",
        "jaxinterp/decompositions",
        "constraints.txt",
    ),
    "browser": (
        "tests/browser/driver.py",
        "tests/browser/graph_page.py",
        "jaxinterp/report/graph.py",
        "jaxinterp/report/graph.css",
        "jaxinterp/report/graph.js",
        "jaxinterp/causal/graphs",
        "jaxinterp/commands/graph.py",
    ),
    "explorer": (
        "tests/browser/driver.py",
        "tests/browser/explorer.py",
        "jaxinterp/explore",
        "jaxinterp/commands/explore.py",
        "jaxinterp/report/palette.css",
    ),
    "frontend": (
        "tests/browser/driver.py",
        "tests/browser/frontend.py",
        "tests/browser/goldens",
    ),
    "site": ("docs", "mkdocs.yml", "README.md", "BUILD.md", "colab", "jaxinterp"),
    "gpu": (
        "benchmarks/gpu_compile.py",
        "benchmarks/gpu_memory.py",
        "benchmarks/compiled_for.py",
        "jaxinterp/kernels",
        "jaxinterp/preflight",
        "jaxinterp/training/program.py",
        "jaxinterp/training/state.py",
        "constraints.txt",
    ),
    "tpu": (
        "benchmarks/tpu_compile.py",
        "benchmarks/compiled_for.py",
        "benchmarks/tpu_bundles.py",
        "benchmarks/topk_programs.py",
        "benchmarks/preflight.py",
        "jaxinterp/kernels",
        "jaxinterp/preflight",
        "jaxinterp/training",
        "constraints.txt",
    ),
}
"""What each check depends on: files, and folders with all their files."""

IGNORED = ("__pycache__",)


def files(check: str) -> list[Path]:
    """Every file that a check covers, sorted.

    Raises:
      FileNotFoundError: one of its names does not exist, and so would silently cover nothing.
    """
    found = []
    for name in COVERS[check]:
        path = ROOT / name
        if not path.exists():
            raise FileNotFoundError(f"{name}, which {check} covers in tests/covered.py")
        found += [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sorted(path for path in found if not set(IGNORED) & set(path.parts))


def digest(check: str) -> str:
    """SHA-256 of the names and contents of all files that a check covers."""
    total = hashlib.sha256()
    for path in files(check):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(ROOT).as_posix()} {content}\n".encode())
    return total.hexdigest()


def noted() -> dict[str, str]:
    """The digests on which the checks last passed."""
    return json.loads(NOTES.read_text()) if NOTES.exists() else {}


def main(check: str, *flags: str) -> None:
    if flags == ("--passed",):
        NOTES.write_text(json.dumps(noted() | {check: digest(check)}, indent=2, sort_keys=True) + "\n")
    else:
        print("unchanged" if noted().get(check) == digest(check) else "changed")


if __name__ == "__main__":
    main(*sys.argv[1:])
