"""A decomposition of one layer or several in a model: one forward pass, its codes offered by name.

    run_with(decomposition, model, tokens, edits={"blocks/0/mlp/codes": edit})

Later layers read what earlier replacements made of the model: errors travel on. Codes of a layer are
`<leaf that is read>/codes`, what is missed (with `keep_error`) `<leaf that is written>/error`; the equations are those
of `offered`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.batch import several
from jaxinterp.core.decomposition import Codes
from jaxinterp.decompositions.offered import offered, with_error
from jaxinterp.models.across import run_across
from jaxinterp.models.edits import Edit
from jaxinterp.models.layers import Tap
from jaxinterp.models.rules import EXACT, Rules
from jaxinterp.models.run import Trace


@runtime_checkable
class HasReaders(Protocol):
    """A decomposition of several layers that gives what reads each of them, for pre-activations (`FromPre`)."""

    def reader(self, layer: int) -> PyTree: ...


def run_with(
    decomposition: Any,
    model: PyTree,
    tokens: object,
    *,
    edits: Mapping[str, Edit] | None = None,
    rules: Rules = EXACT,
    mask: object = None,
    positions: object = None,
    keep: str | Sequence[str] | None = None,
    keep_error: bool = False,
    where: Float[Array, "batch seq"] | None = None,
    k: Int[Array, ""] | None = None,
    training: bool = False,
) -> Trace:
    """Run the model with the decomposition in place of what it decomposes.

    Args:
      decomposition: of one layer (`encode`, `decode`), or of several (`encode_layer`, `decode_layer`).
      edits, rules, mask, positions, keep: as in `run`.
      keep_error: whether the model's own arrays stay, and only the change of codes is added.
      where: where it is 0 the model keeps its own array; None: nowhere.
      k, training: as in `encode`.
    Raises:
      UserError: an array that is read or written is not one of the model's, or is read too late.
    """
    own = decomposition.sites.without_gradients
    alone = isinstance(own.writes, str)
    options = {"k": k, "weight": where, "training": training}

    def offer(layer: int, x: Array, tap: Tap) -> tuple[Codes, Codes]:
        if alone:
            return offered(lambda x: decomposition.encode(x, **options), x, tap, decomposition)
        source = decomposition.reader(layer) if isinstance(decomposition, HasReaders) else None
        return offered(lambda x: decomposition.encode_layer(layer, x, **options), x, tap, source)

    def write(layer: int, offers: Sequence[tuple[Codes, Codes]], x: Array, y: Array, tap: Tap) -> Array:
        def decode(codes: list[Codes]) -> Array:
            return decomposition.decode(codes[0], x) if alone else decomposition.decode_layer(layer, codes, x)

        codes, flowing = ([pair[number] for pair in offers] for number in (0, 1))
        if not keep_error:
            return decode(flowing)
        same = all(first is second for first, second in offers)
        return with_error(decode, y, codes, codes if same else flowing, tap)

    reads, writes = several(own.reads), several(own.writes)
    return run_across(
        model,
        tokens,
        reads,
        writes,
        offer,
        write,
        edits=edits,
        rules=rules,
        mask=mask,
        positions=positions,
        keep=keep,
        where=where,
    )
