"""Kind M: what a wheel holds, the version, a command, and the notebook's first cell on a clean machine.

Right: one top-level package, a console script `jaxinterp`, `jaxinterp.__version__`, and a first cell that says what to
do in one sentence, or installs from the clone that the notebook lies in.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import jaxinterp

ROOT = Path(jaxinterp.__file__).parent.parent
T = Path(tempfile.mkdtemp())
for name in ("pyproject.toml", "README.md", "LICENSE", "jaxinterp", "experiments"):
    (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, T / name)
built = subprocess.run(
    [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", T / "wheels", T], capture_output=True, text=True
)
if built.returncode:
    print("pip wheel:", built.stderr[-300:])
else:
    names = zipfile.ZipFile(next((T / "wheels").iterdir())).namelist()
    print("top-level packages:", sorted({name.split("/")[0] for name in names if ".dist-info" not in name}))
    print("console script:", any(name.endswith("entry_points.txt") for name in names))
    print("py.typed:", "jaxinterp/py.typed" in names)
print("__version__:", getattr(jaxinterp, "__version__", "not there"))

first = next(
    cell for cell in json.loads((ROOT / "colab/first_steps.ipynb").read_text())["cells"] if cell["cell_type"] == "code"
)
source = "".join(first["source"])
blind = "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"  # as on a clean machine
dry = "import subprocess\nsubprocess.run = lambda words, **_: print('would run:', *map(str, words[1:]))\n"
empty = Path(tempfile.mkdtemp())
for where, folder in (("in an empty folder", empty), ("beside the notebook", ROOT / "colab")):
    done = subprocess.run([sys.executable, "-c", blind + dry + source], capture_output=True, text=True, cwd=folder)
    said = (done.stdout + done.stderr).strip().splitlines()
    print(
        f"first cell {where}: code {done.returncode}, {len(said)} line(s), the last: {said[-1][:300] if said else ''}"
    )
