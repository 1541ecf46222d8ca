"""What an installation holds: the package and its command, and nothing that collides with a user's own folders."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("pyproject.toml", "README.md", "LICENSE", "jaxinterp", "experiments")


def test_only_the_package_is_found():
    """Kind M: the wheel held a top-level package `experiments`."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = found["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")}
    assert {name for name in packages if any(fnmatch(name, pattern) for pattern in patterns)} == {"jaxinterp"}
    assert found["project"]["scripts"] == {"jaxinterp": "jaxinterp.commands.main:main"}


@pytest.mark.slow
def test_a_wheel_installed_in_an_empty_environment_is_a_command(tmp_path):
    """Built and installed with pip; what it needs besides is seen in this environment."""
    source, wheels, home = tmp_path / "source", tmp_path / "wheels", tmp_path / "home"
    source.mkdir()
    for name in FILES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", wheels, source], capture_output=True, text=True)
    if built.returncode and "setuptools" in built.stderr:
        pytest.skip("setuptools is not to be had")
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"jaxinterp"}
    assert {"jaxinterp/py.typed", "jaxinterp/report/graph.css", "jaxinterp/report/graph.js"} <= set(names)
    assert any(name.startswith("jaxinterp/models/trained/") for name in names)
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    target = next((tmp_path / "env/lib").glob("python*/site-packages"))
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (target / "others.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")) + "\n")
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python.parent / "jaxinterp", "transcoder", "--model", "tiny", "--out", "x", "--k", "0"],
        capture_output=True, text=True, cwd=home, env=environment,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: k=0 must"), done.stderr
    where = subprocess.run(
        [python, "-c", "import jaxinterp, importlib.util as u; print(jaxinterp.__file__, u.find_spec('experiments'))"],
        capture_output=True, text=True, cwd=home, env=environment,
    )  # fmt: skip
    assert where.stdout.split() == [str(target / "jaxinterp/__init__.py"), "None"], where.stderr
