"""Rows of the sparsity experiment: the loss under edits, per document; kept in a file as they come."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.commands.shell import read_json, say, write_json
from jaxinterp.data.activations import counted, on_device
from jaxinterp.evaluation.intervals import ratio_interval
from jaxinterp.models.run import run


class Measure:
    """The loss of a model under edits, per document."""

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Any]]):
        self.batches = [on_device(batch) for batch in batches]
        every = np.concatenate([np.asarray(batch["document"])[:, :-1].reshape(-1) for batch in batches])
        weight = np.concatenate([np.asarray(counted(batch)).reshape(-1) for batch in self.batches])
        self.documents, self.place = np.unique(every, return_inverse=True)
        self.counts = np.bincount(self.place, weights=weight, minlength=len(self.documents))
        self.weight = weight

    def __call__(self, model: Any, edits: Mapping[str, Any]) -> list[float]:
        """Summed negative log-likelihood of each document, nats."""
        nll = np.concatenate([np.asarray(_nll(model, edits, batch["tokens"])).reshape(-1) for batch in self.batches])
        return np.bincount(self.place, weights=nll * self.weight, minlength=len(self.documents)).tolist()


@eqx.filter_jit
def _nll(model: Any, edits: Mapping[str, Any], tokens: Any) -> Any:
    log_p = jax.nn.log_softmax(run(model, tokens, edits=edits, keep=()).logits[:, :-1])
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]


class OutOfTime(Exception):
    """No new row is to be begun."""


class Results:
    """Rows by (name, sparsity), kept in a file as they come."""

    def __init__(self, path: Path, measure: Measure, most_seconds: float):
        self.path, self.measure, self.most_seconds = path, measure, most_seconds
        self.begun = time.process_time()
        self.content: dict[str, Any] = read_json(path) if path.exists() else {"rows": [], "other": {}}

    def find(self, name: str, share: float) -> dict[str, Any] | None:
        """The row, if it was measured."""
        return next((row for row in self.content["rows"] if (row["score"], row["sparsity"]) == (name, share)), None)

    def row(self, name: str, share: float, model: Any, edits: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Measure a row, or take it from the file."""
        if (found := self.find(name, share)) is not None:
            return found
        if name != "dense":  # what every other row is compared with
            self.check_time()
        clock = time.process_time()
        sums, counts = self.measure(model, edits()), self.measure.counts
        ce = sum(sums) / counts.sum()
        row = {"score": name, "sparsity": share, "ce": ce, "perplexity": math.exp(ce), "tokens": int(counts.sum())}
        self.content["rows"].append(row | {"by_document": sums})
        say(
            f"{name:22s} {share:4.0%}  ce {ce:.4f}  perplexity {math.exp(ce):9.2f}  "
            f"{time.process_time() - clock:.0f} CPU s"
        )
        self.keep()
        return self.content["rows"][-1]

    def also(self, name: str, make: Callable[[], Any]) -> Any:
        """Another result, kept under its name."""
        if name not in self.content["other"]:
            self.check_time()
            self.content["other"][name] = make()
            self.keep()
        return self.content["other"][name]

    def check_time(self) -> None:
        """Raises OutOfTime if the CPU seconds of this run are over."""
        if time.process_time() - self.begun > self.most_seconds:
            raise OutOfTime

    def keep(self) -> None:
        """Write the file."""
        write_json(self.path, self.content)

    def compared(self, first: str, second: str, share: float) -> dict[str, Any] | None:
        """ce of the first minus ce of the second, with an interval over documents."""
        a, b = self.find(first, share), self.find(second, share)
        if a is None or b is None:
            return None
        difference = np.asarray(a["by_document"]) - np.asarray(b["by_document"])
        counts = self.measure.counts
        low, high = ratio_interval(difference, counts, np.arange(len(counts)))
        mean = float(difference.sum() / counts.sum())
        return {"first": first, "second": second, "sparsity": share, "ce difference": mean, "low": low, "high": high}
