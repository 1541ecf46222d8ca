"""What a method reads and writes of a model, by name."""

from dataclasses import dataclass
from typing import Literal

from jaxinterp.core.errors import UserError, suggest

Names = str | tuple[str, ...]

Site = str | tuple[str, ...] | None
"""Where a method is asked to work: one name, several, or None for one that reads the weights or the text alone."""

GRADIENT = "/gradient"
"""The end of a name that means the gradient of the model's own next-token loss by the array named before it."""

RowsWanted = Literal["stream", "kept", "none"]


@dataclass(frozen=True)
class Sites:
    """The arrays that a decomposition reads and writes, by name: `blocks/3/mlp/in` and `blocks/3/mlp/out`.

    A tuple of names where it reads or writes several arrays at once. A name may end in GRADIENT.
    """

    reads: Names
    writes: Names

    def names(self) -> tuple[str, ...]:
        """The names, each once."""
        return tuple(dict.fromkeys((*several(self.reads), *several(self.writes))))

    @property
    def without_gradients(self) -> "Sites":
        """What a forward pass alone can give: gradients are left out, and a single name is not a tuple."""
        reads = tuple(name for name in several(self.reads) if not name.endswith(GRADIENT))
        return Sites(reads[0] if len(reads) == 1 else reads, self.writes)

    @property
    def leaf(self) -> str:
        """The sublayer whose array is written (the first one's, where there are several): `blocks/3/mlp`."""
        return several(self.writes)[0].rpartition("/")[0]


@dataclass(frozen=True)
class Needs:
    """What a method wants from every training step.

    Attributes:
      reads: the arrays that it reads: `batch.inputs`.
      writes: the arrays that it approximates: `batch.targets`.
      gradients: arrays whose gradient (of the model's next-token loss) it wants too, under `<name>/gradient` in
        `batch.arrays`.
      windows: whether it reads the windows of text, `batch.windows`. Only asked with rows="none": with "stream" every
        batch has them.
      rows: "stream": rows come out of a shuffle buffer, each once. "kept": `fit(..., rows=100_000)` harvests so many
        rows once; every step gets all of them, in the same order, numbered by `batch.rows`. "none": nothing is
        harvested; with `windows=False` `fit(method, subject)` takes no text.
    """

    reads: Names = ()
    writes: Names = ()
    gradients: tuple[str, ...] = ()
    windows: bool = False
    rows: RowsWanted = "stream"

    def __post_init__(self) -> None:
        """Raises UserError if `rows` is an unknown word, or arrays are named and nothing is harvested."""
        known = ("stream", "kept", "none")
        if self.rows not in known:
            raise UserError(f"rows={self.rows!r} must be one of {', '.join(known)}.{suggest(str(self.rows), known)}")
        if self.rows == "none" and self.names():
            raise UserError(
                f"rows='none' harvests nothing, but the method names {self.names()}: take 'stream' or 'kept'."
            )

    @property
    def sites(self) -> Sites:
        """What is read and written."""
        return Sites(self.reads, self.writes)

    def names(self) -> tuple[str, ...]:
        """Everything to harvest, each name once."""
        return tuple(dict.fromkeys((*self.sites.names(), *(name + GRADIENT for name in self.gradients))))


def as_needs(needs: Needs | Sites) -> Needs:
    """`Sites` are the needs of a method that reads a stream of rows."""
    return needs if isinstance(needs, Needs) else Needs(needs.reads, needs.writes)


def several(names: Names | None) -> tuple[str, ...]:
    """One name, several or none, as a tuple."""
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else names
