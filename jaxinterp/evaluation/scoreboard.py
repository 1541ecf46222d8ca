"""The scoreboard: one definition of every number, the same held-out tokens for every decomposition.

With target y (the array named `sites.writes`), output ŷ, token weights w (0 at attention sinks and special tokens):

    fvu                 sum w |y - ŷ|^2 / sum w |y - mean(y)|^2, over all held-out tokens, held-out mean, raw units
    l0                  active components per token
    dead_fraction       components that are active on no held-out token
    ce_clean            cross-entropy of the next token, in nats; ce_replaced: with ŷ in place of y wherever w > 0;
                        ce_zero, ce_mean: with 0, and with the training mean of y, in its place
    ce_recovered_zero   (ce_zero - ce_replaced) / (ce_zero - ce_clean); ce_recovered_mean likewise
                        (NaN where the ablation changes nothing: there is nothing to recover)
    kl                  KL(clean || replaced) of the next token's distribution, in nats
    top1_agreement      how often both find the same token most likely

Where w = 0 the model keeps its own y: no method is trained there, and an attention sink would drown the rest.

What is said of the next token is the default effect. Another one, such as the similarity of an encoder's embeddings,
is passed by value: see `jaxinterp.evaluation.effects`.

Three protocols say what is replaced at once. For a decomposition of one array they give the same numbers.

    alone        one array, every other one is the model's own; a row for each array that is written
    together     all arrays, each decoded from what the unchanged model reads; one row
    propagated   all arrays, and later ones read what earlier replacements made of the model: errors travel on; one row

Where all are replaced at once, fvu is the mean of the arrays' own, on the unchanged model's activations; l0 and
dead_fraction are over the features of all; ce_zero and ce_mean ablate all arrays.

Intervals are 95 percent, by resampling documents. A next token counts where it and the token before it have weight and
belong to one document.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import equinox as eqx
import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.decomposition import Decomposition
from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.promotion import ordinary
from jaxinterp.core.sites import Sites, several
from jaxinterp.data.activations import READ, Rows, harvest_jit, on_device
from jaxinterp.data.text.load_text import take
from jaxinterp.decompositions.cross_layer import LayerCodes
from jaxinterp.decompositions.in_model import run_with
from jaxinterp.evaluation.effects import (
    KINDS,
    Columns,
    Effect,
    Row,
    Table,
    Windows,
    answer_with,
    check_effect,
    compared,
)
from jaxinterp.evaluation.heldout import heldout_rows
from jaxinterp.evaluation.intervals import ratio_interval
from jaxinterp.evaluation.next_token import NEXT_TOKEN
from jaxinterp.models.load import Subject
from jaxinterp.models.run import run
from jaxinterp.training.progress import counting, silent

Protocol = Literal["alone", "together", "propagated"]
"""What is replaced at once: see the module's docstring."""


@ordinary()
def score(
    decomposition: Decomposition,
    subject: Subject,
    heldout: grain.MapDataset,
    *,
    tokens: int = 32_768,
    ce_tokens: int = 8_192,
    means: Mapping[str, Array] | None = None,
    effect: Effect = NEXT_TOKEN,
    seed: int = 0,
    protocol: str | None = None,
) -> Row:
    """The decomposition's row of the scoreboard; arguments as for `scoreboard`.

    `protocol`: None is "alone" for a decomposition of one array, "propagated" for one of several.

    Example:
      >>> row = score(result.decomposition, subject, heldout, tokens=512, ce_tokens=256)
      >>> row["l0"]
      4.0
    """
    one = isinstance(decomposition.sites.writes, str)
    rows = scoreboard(
        {type(decomposition).__name__: decomposition},
        subject,
        heldout,
        tokens=tokens,
        ce_tokens=ce_tokens,
        means=means,
        effect=effect,
        seed=seed,
        protocols=protocol or ("alone" if one else "propagated"),
    )
    if len(rows) > 1:
        raise UserError(
            f"protocol={protocol!r} gives a row for each of {len(rows)} arrays: call scoreboard, or take 'together' "
            "or 'propagated'."
        )
    return rows[0]


@ordinary()
def scoreboard(
    decompositions: Mapping[str, Decomposition],
    subject: Subject,
    heldout: grain.MapDataset,
    *,
    tokens: int = 32_768,
    ce_tokens: int = 8_192,
    means: Mapping[str, Array] | None = None,
    effect: Effect = NEXT_TOKEN,
    seed: int = 0,
    protocols: str | Sequence[str] = "alone",
    progress: bool = False,
) -> list[Row]:
    """Score decompositions of one model side by side, of one array or of several.

    Args:
      decompositions: by the name that their row shall have.
      heldout: windows of held-out text, {"tokens", "weight", "document"}, each `[seq]`.
      tokens: how much of it to use: a shuffled sample of windows.
      ce_tokens: on how many of these the effect is measured; each row costs a forward pass.
      means: training means by array name, for mean ablation; default: the `target_mean` of the first decomposition that
        writes the array.
      effect: what is asked of the model with the reconstruction in place.
      seed: of the sample.
      protocols: one, or several: rows of each.
      progress: show how far it is: a bar on a terminal, elsewhere a line every ten seconds.
    Returns:
      Rows of plain numbers, decomposition by decomposition, protocol by protocol; `method` is the name, of one array
      among several `name: array`; `protocol`; `tokens` and `ce_tokens`: how many were measured, which is less than was
      asked for where the text is short.
    Raises:
      UserError: `tokens` or `ce_tokens` is below 1, a protocol is unknown, the model does not give the answer that the
        effect reads, or its arrays are not as wide as what a decomposition writes.
    """
    check_counts(tokens=tokens, ce_tokens=ce_tokens)
    chosen = _protocols(protocols)
    check_effect(subject.model, effect)
    sites = tuple(dict.fromkeys(name for d in decompositions.values() for name in d.sites.names()))
    batches = take(heldout, tokens, seed=seed)
    centers, kept = heldout_rows(subject.model, batches, sites, progress=progress)
    for name, decomposition in decompositions.items():
        check_widths(name, decomposition, centers)
    ablations: dict[str, Array] = {}
    for decomposition in reversed(list(decompositions.values())):
        ablations |= dict(zip(several(decomposition.sites.writes), _means_of(decomposition), strict=True))
    ablations |= dict(means or {})
    boards = [Board(name, each, chosen, effect.of_codes) for name, each in decompositions.items()]
    measured = -(-min(ce_tokens, sum(batch["tokens"].size for batch in batches)) // batches[0]["tokens"].size)
    passes = measured * _passes(decompositions.values(), chosen)
    with counting(passes, "scoring", "forward passes", shown=progress) as done:
        for number, batch in enumerate(batches):
            windows = on_device(batch)
            rows = kept[number] or harvest_jit(subject.model, on_device(windows, READ), sites)
            kept[number] = None
            model = Replaced(effect, subject.model, rows, windows, ablations, {}, done)
            for board in boards:
                board.add(batch, rows, centers, model if number < measured else None)
    return [row for board in boards for row in board.rows(effect)]


def _protocols(protocols: str | Sequence[str]) -> tuple[Protocol, ...]:
    known: Mapping[str, Protocol] = {name: name for name in get_args(Protocol)}
    named = (protocols,) if isinstance(protocols, str) else tuple(protocols)
    for name in named:
        if name not in known:
            raise UserError(f"protocols={name!r} must be one of {', '.join(known)}.{suggest(name, known)}")
    if not named:
        raise UserError("protocols=() asks for no row: give 'alone', 'together', 'propagated' or several of them.")
    return tuple(known[name] for name in named)


def _passes(decompositions: Iterable[Decomposition], protocols: tuple[Protocol, ...]) -> int:
    """Forward passes that a batch costs: one a row, and three (the clean model, two ablations) a set of arrays."""
    alone = [each for d in decompositions for each in several(d.sites.writes)] if "alone" in protocols else []
    jointly = [several(d.sites.writes) for d in decompositions for protocol in protocols if protocol != "alone"]
    return len(alone) + len(jointly) + len(KINDS) * (len(set(alone)) + len(set(jointly)))


def _means_of(decomposition: Decomposition) -> tuple[Array, ...]:
    """The training mean of every array that is written."""
    mean = decomposition.target_mean
    return mean if isinstance(mean, tuple) else (mean,)


def check_widths(name: str, decomposition: Decomposition, centers: Mapping[str, Array]) -> None:
    """Raises UserError if an array of the model is not as wide as what is written to it: another model's dictionary."""
    for site, mean in zip(several(decomposition.sites.writes), _means_of(decomposition), strict=True):
        if jnp.ndim(mean) and mean.size != centers[site].size:
            raise UserError(
                f"{name or type(decomposition).__name__} writes {mean.size} dimensions to {site}, which has "
                f"{centers[site].size} in this model: take the model that it was trained on."
            )


class Board:
    """The tables of one decomposition: one for each array that it writes, one for each protocol that replaces all."""

    def __init__(
        self,
        name: str,
        decomposition: Decomposition,
        protocols: tuple[Protocol, ...],
        of_codes: Callable[[PyTree, PyTree], Columns] | None = None,
    ) -> None:
        self.name, self.decomposition, self.protocols, self.of_codes = name, decomposition, protocols, of_codes
        self.writes = several(decomposition.sites.writes)
        self.layers = [Table() for _ in self.writes]
        self.joint: dict[Protocol, Table] = {protocol: Table() for protocol in protocols if protocol != "alone"}

    def add(self, batch: Windows, rows: Rows, centers: Mapping[str, Array], model: "Replaced | None") -> None:
        """Add a batch; `model` None: without the effect."""
        found = _reconstruct(self.decomposition, rows, {name: centers[name] for name in self.writes}, self.of_codes)
        about = {"document": batch["document"], "weight": batch["weight"]}
        for table, (_, columns) in zip(self.layers, found, strict=True):
            table.add(**about, **columns)
        for table in self.joint.values():
            table.add(**about, active=sum(columns["active"] for _, columns in found))
        if model is None:
            return
        outputs = dict(zip(self.writes, (output for output, _ in found), strict=True))
        for protocol in self.protocols:
            if protocol == "alone":
                for table, (name, output) in zip(self.layers, outputs.items(), strict=True):
                    _add_effect(table, batch, model.alone(name, output))
            else:
                own = self.decomposition if protocol == "propagated" else None
                _add_effect(self.joint[protocol], batch, model.every(outputs, own))

    def rows(self, effect: Effect) -> list[Row]:
        """The rows of every protocol."""
        rows, sites = [], self.decomposition.sites
        for protocol in self.protocols:
            if protocol == "alone":
                for name, table in zip(self.writes, self.layers, strict=True):
                    title = self.name if len(self.writes) == 1 else f"{self.name}: {name}"
                    rows.append(row_of(title, Sites(sites.reads, name), table, effect))
            else:
                table = self._mixed(self.joint[protocol])
                rows.append(row_of(self.name, sites, table, effect, protocol))
        return rows

    def _mixed(self, table: Table) -> Table:
        """Every array counts alike: squares and spreads in units of its own spread. Constant arrays have none."""
        spreads = [layer["spread"].sum() if np.isfinite(layer.fvu()) else np.inf for layer in self.layers]
        for name in ("squares", "spread"):
            shares = (layer[name] / spread for layer, spread in zip(self.layers, spreads, strict=True))
            table.add(**{name: sum(shares)})
        table.add(fired=np.concatenate([layer.total("fired") for layer in self.layers]))
        return table


def _add_effect(table: Table, batch: Windows, columns: Columns) -> None:
    table.add(item_document=item_documents(batch, columns), **columns)


@dataclass(frozen=True)
class Replaced:
    """What the model answers to one batch with arrays replaced; answers that several rows need are kept.

    done: called before every forward pass, for what shows how far the scoring is.
    """

    effect: Effect
    model: PyTree
    rows: Rows
    windows: dict[str, Array]
    ablations: dict[str, Array]
    kept: dict[tuple[str, ...], tuple[Array, Columns]]
    done: Callable[[], None] = silent

    def alone(self, site: str, output: Array) -> Columns:
        """One array replaced by the reconstruction."""
        if (site,) not in self.kept:
            y, counts = self.rows.arrays[site], self.rows.weight[..., None] > 0
            values = y, jnp.where(counts, 0.0, y), jnp.where(counts, self.ablations[site], y)
            self.kept[site,] = of_kinds(self.effect, (self._put(site, value) for value in values), self.windows)
        clean, columns = self.kept[site,]
        return columns | compared(self.effect, self._put(site, output), clean, self.windows)

    def every(self, outputs: Mapping[str, Array], propagated: Decomposition | None) -> Columns:
        """All arrays replaced: by these reconstructions, or by those that the decomposition makes on the way."""
        places = ("every", *outputs)
        if places not in self.kept:
            zeros = {name: jnp.zeros((), jnp.float32) for name in outputs}
            means = {name: self.ablations[name] for name in outputs}
            answers = (self._answer(values) for values in ({}, zeros, means))
            self.kept[places] = of_kinds(self.effect, answers, self.windows)
        clean, columns = self.kept[places]
        if propagated is None:
            answer = self._answer(outputs)
        else:
            self.done()
            answer = _propagated(self.effect, propagated, self.model, self.windows["tokens"], self.rows.weight)
        return columns | compared(self.effect, answer, clean, self.windows)

    def _put(self, site: str, value: Array) -> Array:
        self.done()
        return answer_with(self.effect, self.model, self.windows["tokens"], site, value)

    def _answer(self, values: Mapping[str, Array]) -> Array:
        self.done()
        return _with_values(self.effect, self.model, self.windows["tokens"], self.rows.weight, dict(values))


class _Where(eqx.Module):
    """The edit that puts `value` where `mask` says so."""

    mask: Float[Array, "batch seq"]
    value: Float[Array, "..."]

    def __call__(self, x: Array) -> Array:
        return jnp.where(self.mask[..., None] > 0, self.value, x).astype(x.dtype)


@eqx.filter_jit
def _with_values(
    effect: Effect, model: PyTree, tokens: Int[Array, "batch seq"], weight: Array, values: dict[str, Array]
) -> Array:
    """The answer with values in place of the named arrays wherever there is weight."""
    return effect.read(run(model, tokens, edits={name: _Where(weight, value) for name, value in values.items()}))


@eqx.filter_jit
def _propagated(
    effect: Effect, decomposition: Decomposition, model: PyTree, tokens: Int[Array, "batch seq"], weight: Array
) -> Array:
    """The answer with the decomposition in the model: later arrays read what earlier replacements made of it."""
    return effect.read(run_with(decomposition, model, tokens, where=weight))


def check_counts(**counts: int) -> None:
    """Raises UserError if a number of tokens is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}={count} must be at least 1.")


@eqx.filter_jit
def _reconstruct(
    decomposition: Decomposition,
    rows: Rows,
    centers: dict[str, Array],
    of_codes: Callable[[PyTree, PyTree], Columns] | None = None,
) -> list[tuple[Array, dict[str, Array]]]:
    """For every array that is written: ŷ where there is weight and y elsewhere; per token the numbers of `Table`."""
    x, weight = rows.at(decomposition.sites.reads), rows.weight
    codes = decomposition.encode(x)
    decoded = decomposition.decode(codes, x)
    layers, outputs = (codes.layers, decoded) if isinstance(codes, LayerCodes) else ((codes,), (decoded,))
    found = []
    for (name, center), own, output in zip(centers.items(), layers, outputs, strict=True):
        y = rows.arrays[name]
        columns = {
            "squares": weight * jnp.sum((y - output) ** 2, axis=-1),
            "spread": weight * jnp.sum((y - center) ** 2, axis=-1),
            "size": weight * jnp.sum(y**2, axis=-1),
            "active": weight * own.active(),
            "fired": own.fired(weight),
        }
        if of_codes is not None and codes is own:
            columns |= of_codes(decomposition, own)
        found.append((jnp.where(weight[..., None] > 0, output, y), columns))
    return found


def of_kinds(effect: Effect, answers: Iterable[Array], windows: Mapping[str, Array]) -> tuple[Array, Columns]:
    """The unchanged model's answer, and columns of it and of the ablations, `nll_clean` and so on.

    Args:
      answers: in the order of KINDS; made one after another, so that two of them stand in memory at a time.
    """
    columns: Columns = {}
    clean = None
    for kind, answer in zip(KINDS, answers, strict=True):
        clean = answer if clean is None else clean
        each = compared(effect, answer, clean, windows)
        columns |= {f"{name}_{kind}": column for name, column in each.items() if name != "counted"}
    assert clean is not None
    return clean, columns


def item_documents(batch: Windows, columns: Columns) -> np.ndarray:
    """The document of each item: item i of a window begins at its token i."""
    return np.asarray(batch["document"])[:, : columns["counted"].shape[1]]


def row_of(name: str, sites: Sites, table: Table, effect: Effect = NEXT_TOKEN, protocol: Protocol = "alone") -> Row:
    """The row of the scoreboard that a table of columns adds up to."""
    weight, document = table["weight"], table["document"].astype(np.int64)
    count, spread, fvu = weight.sum(), table["spread"], table.fvu()
    numbers = effect.numbers(table)
    last: Row = {key: numbers.pop(key) for key in ("ce_tokens", "compared") if key in numbers}
    return {
        "method": name,
        "fvu": fvu,
        "fvu_interval": ratio_interval(table["squares"], spread if np.isfinite(fvu) else 0 * spread, document),
        "l0": float(table["active"].sum() / count),
        "dead_fraction": float(np.mean(table.total("fired") == 0)),
        **numbers,
        "tokens": int(count),
        **last,
        "reads": sites.reads,
        "writes": sites.writes,
        "protocol": protocol,
    }
