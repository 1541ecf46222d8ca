"""What people call features: `labels.json` beside the run, read again for every answer, written in one step.

    {"version": 1, "labels": {"606": "dates in Roman numerals"}}

Labels are text and nothing else: the file is data, pages escape what they show.
"""

import json
import threading
from pathlib import Path

from jaxinterp.core.errors import UserError
from jaxinterp.storage.files import write_text

MOST = 500
"""Characters of a label."""


class Labels:
    """The labels of one run; safe to use from several threads of one process."""

    def __init__(self, path: str | Path, features: int):
        self._path, self._features, self._lock = Path(path), features, threading.Lock()

    def all(self) -> dict[int, str]:
        """By feature.

        Raises:
          UserError: the file is damaged: nothing is overwritten.
        """
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            pairs = kept["labels"].items()
            return {int(number): text for number, text in pairs if isinstance(text, str) and number.isdigit()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{self._path} is damaged: mend it, or move it away.") from error

    def write(self, feature: int, text: str) -> dict[int, str]:
        """Keep a label; an empty one removes it. Returns all.

        Raises:
          UserError: the feature does not exist, the label is too long, or reading or writing the file fails.
        """
        text = " ".join(text.split())
        if not 0 <= feature < self._features:
            raise UserError(f"feature={feature} must be from 0 to {self._features - 1}.")
        if len(text) > MOST:
            raise UserError(f"the label has {len(text)} characters: write at most {MOST}.")
        with self._lock:
            labels = self.all()
            if text:
                labels[feature] = text
            else:
                labels.pop(feature, None)
            entries = {str(number): labels[number] for number in sorted(labels)}
            write_text(self._path, json.dumps({"version": 1, "labels": entries}, indent=2, ensure_ascii=False) + "\n")
            return labels
