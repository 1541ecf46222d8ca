"""What a server holds: the index, the labels, and the model, which is loaded when it is first needed."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxinterp.core.decomposition import Shown
from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.explore import answers, live
from jaxinterp.explore.compare import Pair, pair_rows
from jaxinterp.explore.index import Index
from jaxinterp.explore.labels import Labels
from jaxinterp.models.files.subject import Subject
from jaxinterp.storage.files import write_text

ABLATED_WINDOWS = 8


@dataclass
class Explorer:
    """One run, and perhaps another one to compare it with.

    Attributes:
      load: loads the dictionary and its subject; called once, when something needs the model. None: nothing can.
      other: the index of another dictionary, and the nearest features of it.
    """

    index: Index
    labels: Labels
    load: Callable[[], tuple[Shown, Subject]] | None = None
    other: Pair | None = None
    _busy: threading.Lock = field(default_factory=threading.Lock)
    _loaded: tuple[Shown, Subject] | None = None

    def about(self) -> dict[str, Json]:
        """What the page must know first."""
        other = None if self.other is None else answers.about(self.other.theirs)
        return answers.about(self.index) | {"live": self.load is not None, "other": other}

    def model(self) -> tuple[Shown, Subject]:
        """The dictionary and the subject.

        Raises:
          UserError: there is none.
        """
        if self._loaded is None:
            if self.load is None:
                raise UserError("this explorer has no model: start it with the folder of a run.")
            self._loaded = self.load()
        return self._loaded

    def feature(self, number: int) -> dict[str, Json]:
        """A feature's page; with the effect of its ablation, where that was measured before."""
        found = answers.feature(self.index, number, self.labels.all())
        return found | {"effect": self._kept_effect(number)}

    def effect(self, number: int) -> dict[str, Json]:
        """Measure what ablating a feature does, or read what was measured before."""
        number = answers.check_feature(self.index, number)
        kept = self._kept_effect(number)
        if kept is not None:
            return kept
        where, values = self.index.firings.of(number)
        if not len(where):
            raise UserError(f"feature {number} never fires on the index's text: there is nothing to ablate.")
        seq = self.index.seq
        windows = where // seq
        strongest = list(dict.fromkeys(windows[np.argsort(-np.abs(values), kind="stable")].tolist()))[:ABLATED_WINDOWS]
        chosen = np.resize(strongest, ABLATED_WINDOWS)  # one shape, one program
        rows, fired = np.asarray(self.index.tokens)[chosen], np.zeros((ABLATED_WINDOWS, seq), np.float32)
        for row, window in enumerate(chosen):
            inside = windows == window
            fired[row, where[inside] % seq] = values[inside]
        with self._busy:
            found = live.ablated(*self.model(), rows, fired, number)
        write_text(self._effect_path(number), json.dumps(found))
        return found

    def fires_on(self, text: str) -> dict[str, Json]:
        """Your own text."""
        with self._busy:
            found = live.fires_on(*self.model(), text)
        labels = self.labels.all()
        listed = {j for token in found["fires"] for j, _ in token} | {each["i"] for each in found["features"]}
        return found | {"rows": {j: answers.row(self.index, j, labels) for j in sorted(listed)}}

    def steered(self, prompt: str, number: int, strength: float, new: int, temperature: float, seed: int) -> Json:
        """Steer along one feature; `strength` in multiples of its largest activation."""
        number = answers.check_feature(self.index, number)
        unit = abs(float(self.index.sums.largest[number])) or 1.0
        with self._busy:
            found = live.steered(
                *self.model(), prompt, number, strength * unit, new=new, temperature=temperature, seed=seed
            )
        return found | {"amount": strength * unit}

    def compared(self, first: int, count: int, order: str) -> dict[str, Json]:
        """A page of matched features."""
        if self.other is None:
            raise UserError("there is no other dictionary: start with --compare RUN.")
        return pair_rows(self.index, self.other, self.labels.all(), first=first, count=count, order=order)

    def _effect_path(self, number: int) -> Path:
        return self.index.folder / "effects" / f"{int(number)}.json"

    def _kept_effect(self, number: int) -> dict[str, Json] | None:
        try:
            found = json.loads(self._effect_path(number).read_text())
        except (OSError, ValueError):
            return None
        return (
            found if isinstance(found, dict) and found.keys() >= live.MEASURED else None
        )  # an older one is measured again
