"""What one whole training job is, and how one that runs by itself is made to go on turn by turn.

No jax, no torch here: this module is imported under the peers' interpreter as well.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Job:
    """A SmolLM2-shaped random model, the layer whose MLP output is taken apart, and the length of a turn.

    Attributes:
      layer: counted from 0; `layer` + 1 layers are needed.
      seq: tokens of a window; the tokens of a step come from `benchmarks.workers.Shape`.
      steps: training steps of one turn.
      dtype: "float32" or "bfloat16": of the subject model.
    """

    layer: int
    steps: int = 2
    dtype: str = "float32"
    seq: int = 256
    width: int = 576
    layers: int = 30
    d_mlp: int = 1536
    heads: int = 9
    kv_heads: int = 3
    vocab: int = 49152

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.width // self.heads

    @staticmethod
    def parse(text: str) -> "Job":
        """From what `text` of another process wrote."""
        return Job(**json.loads(text))

    def text(self) -> str:
        """As JSON, for a command line."""
        return json.dumps(asdict(self))

    def tokens(self, windows: int, seed: int = 0) -> np.ndarray:
        """Random token ids, int32 [windows, seq], the same in every process."""
        return np.random.default_rng(seed).integers(0, self.vocab, (windows, self.seq), np.int32)

    def operations(self, tokens: int) -> int:
        """Floating-point operations of the matmuls of the layers that are needed: projections and attention products.

        2 N d (2 h + 2 k) for the projections with h = heads x head_dim, k = kv_heads x head_dim; 6 N d m for the gated
        MLP; 4 N seq h for the two attention products, of all pairs of positions.
        """
        own, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.width * (2 * own + 2 * shared) + 4 * self.seq * own
        return (self.layer + 1) * tokens * (attention + 6 * self.width * self.d_mlp)


class Turns:
    """A function in a thread of its own, which goes on for a turn when told to.

    The function is given this object and calls `pause` where a turn ends; it stands still until the next `turn`.
    """

    def __init__(self, function: Callable[["Turns"], Any]):
        self._go, self._over = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = False
        self._function = function
        threading.Thread(target=self._run, daemon=True).start()

    def pause(self) -> None:
        """Called by the function: the turn is over."""
        self._over.release()
        self._go.acquire()

    def turn(self) -> None:
        """Let the function go on, and wait until its turn is over.

        Raises:
          RuntimeError: it has come to its end.
          BaseException: what it raised.
        """
        if self._ended:
            raise RuntimeError("the training run has come to its end: give it more steps.")
        self._go.release()
        self._over.acquire()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._function(self)
        except BaseException as error:  # raised where the turn is waited for
            self._error = error
        self._ended = True
        self._over.release()
