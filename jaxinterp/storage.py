"""Checkpoints of training: the only Orbax code of the project.

A checkpoint holds everything that changes (one pytree, by leaf name) beside the data iterator, so that a run can be
resumed bit for bit. The configuration of the run stands in the folder and is compared on restore: a run is never
resumed with another k or site.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxinterp.errors import UserError
from jaxinterp.trees import fill_leaves, named_leaves


class Checkpoints:
    """The checkpoints of one run in one folder; a context manager that waits for writes on leaving.

    Args:
      config: plain JSON values; written on creation, compared with what is there on resume.
      keep: how many of the latest checkpoints are kept.
    Raises:
      UserError: the folder holds checkpoints of another configuration (the first differing field is named), or it
        holds checkpoints and `resume` is False.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], *, resume: bool, keep: int = 2):
        self.folder = Path(folder).absolute()
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._orbax = ocp.training.Checkpointer(
            self.folder, preservation_policy=policy, custom_metadata={"config": dict(config)}
        )
        try:
            self._check(config, resume)
        except UserError:
            self._orbax.close()
            raise

    def _check(self, config: Mapping[str, Any], resume: bool) -> None:
        if self.latest is None:
            return
        if not resume:
            raise UserError(
                f"checkpoint folder {self.folder} already holds step {self.latest}: pass resume=True (--resume) to "
                "continue it, or choose another folder."
            )
        metadata = self._orbax.root_metadata().custom_metadata or {}
        difference = first_difference(metadata.get("config", {}), dict(config))
        if difference is not None:
            field, saved, asked = difference
            raise UserError(
                f"checkpoint in {self.folder} was made with {field}={saved!r}, not {asked!r}: resume with the saved "
                "value, or choose another folder."
            )

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, None where there is none."""
        return None if self._orbax.latest is None else self._orbax.latest.step

    def save(self, step: int, state: Any, data: Any) -> None:
        """Write the state and the data iterator's position; returns when the copy off the devices is done."""
        self._orbax.save_checkpointables_async(step, {"state": _stored(named_leaves(state)), "data": data}, force=True)

    def restore(self, template: Any, data: Any) -> Any:
        """The newest state, in the shapes and shardings of `template`; moves the data iterator to its position.

        Args:
          template: the state as `jax.ShapeDtypeStruct`s (with shardings).
        """
        shapes = _stored(named_leaves(template))
        loaded = self._orbax.load_checkpointables(self.latest, {"state": shapes, "data": data})
        return fill_leaves(template, {name.replace(".", "/"): leaf for name, leaf in loaded["state"].items()})

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._orbax.close()


def first_difference(saved: Any, asked: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two JSON values differ: (dotted name, saved value, asked value), or None."""
    if isinstance(saved, Mapping) and isinstance(asked, Mapping):
        for key in [*saved, *(key for key in asked if key not in saved)]:
            name = f"{field}.{key}" if field else str(key)
            difference = first_difference(saved.get(key), asked.get(key), name)
            if difference is not None:
                return difference
        return None
    return None if saved == asked else (field, saved, asked)


def _stored(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaf names as Orbax can write them: it takes `/` for a folder."""
    return {
        name.replace("/", "."): leaf
        for name, leaf in leaves.items()
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    }
