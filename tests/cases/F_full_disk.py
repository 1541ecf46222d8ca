"""Kind F: a really full disk. A checkpoint, a dictionary and a saved subject are written to small tmpfs mounts.

Needs the right to mount (root, or `unshare -Urm`). Right: one line each that says "No space left", no half files.
"""

import subprocess
import tempfile
from pathlib import Path

import jax

from jaxinterp import UserError, load
from jaxinterp.models.load import save_subject
from jaxinterp.storage.checkpoints import Checkpoints


def attempt(label, call):
    try:
        print("PASS   ", label, "->", call())
    except UserError as error:
        print("REFUSED", label, "->", len(str(error).splitlines()), "line(s):", str(error)[:500])
    except Exception as error:
        print("CRASH  ", label, "->", type(error).__name__, str(error)[:300])


def checkpoint(folder):
    with Checkpoints(folder, {"k": 1}, resume=True) as checkpoints:
        checkpoints.save(1, {"w": jax.random.normal(jax.random.key(0), (400_000,))}, {"next_index": 1})


def in_full(label, size, call):
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", name], check=True)
        try:
            attempt(label, lambda: call(Path(name)))
            print("        left:", sorted(str(p.relative_to(name)) for p in Path(name).rglob("*") if p.is_file())[:4])
        finally:
            subprocess.run(["umount", "-l", name], check=True)


in_full("checkpoint of 1.6 MB", "1m", lambda folder: checkpoint(folder / "checkpoints"))
subject = load("tiny")
in_full("subject of 0.6 MB", "256k", lambda folder: save_subject(subject, folder / "model"))
