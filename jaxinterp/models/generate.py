"""Text that comes out of a subject: prompts in a batch, a key/value cache, and the same edits as `run`.

    out = generate(subject, "The capital of France is", max_tokens=8)
    out.text
    steered = generate(subject, prompts, edits={"blocks/8/resid/post": Add(4.0 * direction)}, temperature=0.8, seed=1)

Greedy output (temperature 0, the default) equals that of a forward pass over everything for every token. Prompts of
unequal length are padded on the left; padding has position -1 and no token looks at it.

With a cache an edit sees the prompt once and then one token at a time. Edits that would come out otherwise in that way
(they hold values for several positions, mix positions, or change `pattern`) are refused: `cache=False` takes every edit
and computes everything anew for every token; there arrays have `prompt + max_tokens` positions from the start, and what
lies behind the newest token does not matter. Models that were adapted from other libraries always run so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxinterp.core.callables import takes
from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.models.cache import Kept, can_cache, empty_caches, pass_over_new
from jaxinterp.models.edits import Edit
from jaxinterp.models.files.chat import turn_ends
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.ids import check_ids
from jaxinterp.models.prompts import as_prompts, end_at, readable
from jaxinterp.models.run import run
from jaxinterp.models.sampling import Sampling, next_token
from jaxinterp.models.sites import check_site
from jaxinterp.models.tokenwise import check_tokenwise
from jaxinterp.models.transformer import Transformer

ROUND = 16
"""Prompts and cache are padded to multiples of this, so that programs are used again."""


class During(eqx.Module):
    """The edit `edit` on the prompt only, or on what is generated only; for `generate`."""

    edit: Callable[..., Array]
    when: Literal["prompt", "generated"] = eqx.field(static=True)
    lengths: Int[Array, " batch"] | None = None

    def __check_init__(self) -> None:
        """Raises UserError if `when` is another word."""
        if self.when not in ("prompt", "generated"):
            raise UserError(f"During(..., {self.when!r}): must be 'prompt' or 'generated'.")

    def __call__(self, x: Array, *, positions: Int[Array, "batch seq"]) -> Array:
        if self.lengths is None:
            raise UserError("During(...) is for generate, which knows where the prompt ends; run takes At(...).")
        generated = positions >= self.lengths[:, None]
        here = generated if self.when == "generated" else ~generated
        edited = self.edit(x, positions=positions) if takes(self.edit, "positions") else self.edit(x)
        return jnp.where(here.reshape(*here.shape, *(1,) * (x.ndim - 2)), edited, x)


@dataclass(frozen=True)
class Generation:
    """What came out, a row for every prompt.

    Attributes:
      tokens: ids that were generated; a stop token is the last one, where one came.
      texts: what they say, up to a stop text; () where the subject has no tokenizer.
      log_probabilities: of every token under the (edited) model at temperature 1, nats.
      ended: by row, "end" (a stop token), "stop" (a stop text) or "length".
      prompts: the prompts' ids.
    """

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    log_probabilities: tuple[tuple[float, ...], ...]
    ended: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]

    @property
    def text(self) -> str:
        """The text of the only prompt.

        Raises:
          UserError: there are several, or the subject has no tokenizer.
        """
        if len(self.texts) != 1:
            raise UserError(f"there are {len(self.texts)} texts: take one of `texts`.")
        return self.texts[0]


class State(eqx.Module):
    """What changes from token to token."""

    tokens: Int[Array, "batch slots"]
    places: Int[Array, "batch slots"]
    log_p: Float[Array, "batch slots"]
    done: Bool[Array, " batch"]
    slot: Int[Array, ""]  # the next to be filled
    caches: list[Kept] | None


@ordinary()
def generate(
    subject: Subject,
    prompt: object,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    edits: Mapping[str, Edit] | None = None,
    stop: str | int | Sequence[str | int] = (),
    chat: bool = False,
    cache: bool | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> Generation:
    """Continue prompts.

    Args:
      prompt: a text, a list of texts, ids (a list or an array, one row or several), or, with `chat`, a text, a list of
        messages {"role", "content"}, or a list of such lists.
      max_tokens: how many at most.
      temperature, top_k, top_p, seed: see `Sampling`; temperature 0 is greedy.
      edits: as in `run`; `During(edit, "generated")` and `At(edit, positions)` choose positions, which are absolute.
      stop: token ids and texts that end a row, besides the end of text.
      chat: write the prompt as a conversation with the tokenizer's own template.
      cache: keep keys and values; default: wherever the model can.
      on_text: called with (row, text) as text comes, in this process.
    Raises:
      UserError: before compute: a value out of range, an empty prompt, more tokens than the model's context, an edit
        that a cache would change, no tokenizer or chat template where one is needed.

    Example:
      >>> len(generate(subject, "the cat", max_tokens=4).tokens[0])
      4
    """
    sampling = Sampling(temperature, top_k, top_p)
    for name, value in (("max_tokens", max_tokens), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise UserError(f"{name}={value!r} must be a whole number.")
    for name, edit in (edits or {}).items():
        if not callable(edit):
            raise UserError(
                f"the edit at {name!r} is a {type(edit).__name__}: give a callable, as Add(...) or SetTo(...)."
            )
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be positive.")
    prompts = as_prompts(subject, prompt, chat)
    texts, ids = _stops(subject, stop, chat)
    why_not = can_cache(subject.model)
    if cache and why_not:
        raise UserError(f"cache=True: {why_not}; give cache=False.")
    cached = not why_not if cache is None else cache
    check_context(subject.model, max(map(len, prompts)), max_tokens)
    for row in prompts:
        check_ids(subject.model, np.asarray(row, np.int32), "prompt")
    if not cached and not takes(subject.model, "mask") and len({len(row) for row in prompts}) > 1:
        raise UserError(
            f"a {type(subject.model).__name__} takes no mask, so prompts of unequal lengths need a call for each."
        )
    state = _start(prompts, max_tokens, ROUND if cached else 1)
    first = int(state.slot)
    lengths = jnp.asarray([len(row) for row in prompts], jnp.int32)
    edits = {
        name: During(edit.edit, edit.when, lengths) if isinstance(edit, During) else edit
        for name, edit in (edits or {}).items()
    }
    for name in edits:
        if not any(name.startswith(f"{other}/") for other in edits):  # arrays that an edit offers come with it
            check_site(subject.model, name)
    if cached:
        check_tokenwise(subject.model, edits, state.places, first)
    stops, key = jnp.asarray(sorted(ids) or [-1], jnp.int32), jax.random.key(seed)
    stride = 1 if on_text else 8 if texts else max_tokens
    state = prefill(subject.model, state, edits, sampling, stops, key, first, cached)
    said = [""] * len(prompts)
    ends: list[str | None] = [None] * len(prompts)
    while True:
        if texts or on_text:
            said, ends, state = _look(subject, state, first, texts, said, ends, on_text)
        until = min(int(state.slot) + stride, first + max_tokens)
        if int(state.slot) >= first + max_tokens or bool(state.done.all()):
            break
        state = decode(subject.model, state, edits, sampling, stops, key, jnp.asarray(until), cached)
    return _finish(subject, state, prompts, first, max_tokens, ids, texts)


def check_context(model: PyTree, prompt: int, new: int) -> None:
    """Raises UserError if prompt and new tokens are longer than the model's context."""
    if isinstance(model, Transformer) and prompt + new > model.config.context:
        raise UserError(
            f"max_tokens={new} behind a prompt of {prompt} tokens goes beyond the model's context of "
            f"{model.config.context}: ask for at most {max(0, model.config.context - prompt)}."
        )


def _stops(subject: Subject, stop: str | int | Sequence[str | int], chat: bool) -> tuple[list[str], set[int]]:
    """Stop texts, and stop tokens with the end of text among them."""
    if isinstance(stop, float) or not all(
        isinstance(each, str | int) for each in ([] if isinstance(stop, int) else stop)
    ):
        raise UserError(f"stop={stop!r} must be texts and token ids.")
    given = [stop] if isinstance(stop, str | int) else list(stop)
    texts = [each for each in given if isinstance(each, str)]
    ids = {each for each in given if isinstance(each, int)}
    if "" in texts:
        raise UserError("stop has an empty text: it would end every row at once.")
    if texts and subject.tokenizer is None:
        raise UserError(f"stop={texts[0]!r} is text, but the subject has no tokenizer: give token ids.")
    if subject.tokenizer is not None:
        ids |= {subject.tokenizer.end} if subject.tokenizer.end is not None else set()
        ids |= set(turn_ends(subject.tokenizer)) if chat else set()
    return texts, ids


def _start(prompts: Sequence[Sequence[int]], max_tokens: int, multiple: int) -> State:
    """Prompts on the right end of their part of the slots; nothing behind it yet."""
    width = -(-max(map(len, prompts)) // multiple) * multiple
    slots = width + -(-max_tokens // multiple) * multiple
    tokens, places = np.zeros((len(prompts), slots), np.int32), np.full((len(prompts), slots), -1, np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) : width] = ids
        places[row, width - len(ids) : width] = np.arange(len(ids))
    return State(
        jnp.asarray(tokens),
        jnp.asarray(places),
        jnp.zeros(tokens.shape, jnp.float32),
        jnp.zeros(len(prompts), bool),
        jnp.asarray(width),
        None,
    )


@eqx.filter_jit
def prefill(
    model: PyTree,
    state: State,
    edits: Mapping[str, Edit],
    sampling: Sampling,
    stops: Int[Array, " stops"],
    key: PRNGKeyArray,
    width: int,
    cached: bool,
) -> State:
    """The pass over the prompts, and the first token behind each."""
    if cached:
        caches = empty_caches(model, *state.tokens.shape)
        start = jnp.zeros((), state.slot.dtype)
        logits, caches = pass_over_new(model, state.tokens[:, :width], caches, state.places, start, edits)
        state = eqx.tree_at(lambda state: state.caches, state, caches, is_leaf=lambda x: x is None)
    else:
        logits = _all_anew(model, state, edits)
    return _append(state, logits, sampling, stops, key)


@eqx.filter_jit
def decode(
    model: PyTree,
    state: State,
    edits: Mapping[str, Edit],
    sampling: Sampling,
    stops: Int[Array, " stops"],
    key: PRNGKeyArray,
    until: Int[Array, ""],
    cached: bool,
) -> State:
    """Tokens one after another until slot `until` is reached or every row has ended: one `lax.while_loop`."""

    def goes_on(state: State) -> Array:
        return (state.slot < until) & ~jnp.all(state.done)

    def step(state: State) -> State:
        if cached and state.caches is not None:
            last = jax.lax.dynamic_slice_in_dim(state.tokens, state.slot - 1, 1, axis=1)
            logits, caches = pass_over_new(model, last, state.caches, state.places, state.slot - 1, edits)
            state = eqx.tree_at(lambda state: state.caches, state, caches)
        else:
            logits = _all_anew(model, state, edits)
        return _append(state, logits, sampling, stops, key)

    return jax.lax.while_loop(goes_on, step, state)


def _all_anew(model: PyTree, state: State, edits: Mapping[str, Edit]) -> Float[Array, "batch vocab"]:
    """The logits behind the newest token from a pass over all slots; those behind it are padding."""
    if not isinstance(model, Transformer) and not takes(model, "mask"):
        trace = run(model, state.tokens, edits=edits, keep=())
        return jax.lax.dynamic_index_in_dim(trace.logits, state.slot - 1, 1, keepdims=False)
    real = state.places >= 0
    trace = run(model, state.tokens, edits=edits, mask=real, positions=state.places, keep=("final",))
    if isinstance(model, Transformer):
        return model.unembed(jax.lax.dynamic_index_in_dim(trace["final"], state.slot - 1, 1, keepdims=False))
    return jax.lax.dynamic_index_in_dim(trace.logits, state.slot - 1, 1, keepdims=False)


def _append(state: State, logits: Array, sampling: Sampling, stops: Array, key: PRNGKeyArray) -> State:
    """Choose the next token of every row and put it into the next slot; ended rows stay as they are."""
    token, log_p = next_token(logits, sampling, jax.random.fold_in(key, state.slot))
    position = jnp.max(state.places, axis=1) + 1

    def put(array: Array, value: Array) -> Array:
        column = value[:, None].astype(array.dtype)  # an argmax is int64 under x64
        return jax.lax.dynamic_update_slice_in_dim(array, column, state.slot, axis=1)

    return State(
        put(state.tokens, jnp.where(state.done, 0, token)),
        put(state.places, jnp.where(state.done, -1, position).astype(state.places.dtype)),
        put(state.log_p, jnp.where(state.done, 0.0, log_p)),
        state.done | jnp.isin(token, stops),
        state.slot + 1,
        state.caches,
    )


def _rows(state: State, first: int, end: int) -> list[list[int]]:
    """What every row has generated so far."""
    tokens, places = np.asarray(state.tokens), np.asarray(state.places)
    return [[int(id) for id in tokens[row, first:end][places[row, first:end] >= 0]] for row in range(len(tokens))]


def _look(
    subject: Subject,
    state: State,
    first: int,
    texts: Sequence[str],
    said: list[str],
    ends: list[str | None],
    on_text: Callable[[int, str], None] | None,
) -> tuple[list[str], list[str | None], State]:
    """Stop rows whose text holds a stop text, and pass on what is new."""
    said, ends = list(said), list(ends)
    for row, ids in enumerate(_rows(state, first, int(state.slot))):
        whole = readable(subject, ids)
        place = end_at(whole, texts)
        now = whole if place is None else whole[:place]
        if place is not None and ends[row] is None:
            ends[row] = "stop"
            state = eqx.tree_at(lambda state: state.done, state, state.done.at[row].set(True))
        if on_text is not None and len(now) > len(said[row]) and now.startswith(said[row]):
            on_text(row, now[len(said[row]) :])
            said[row] = now
    return said, ends, state


def _finish(
    subject: Subject,
    state: State,
    prompts: Sequence[Sequence[int]],
    first: int,
    max_tokens: int,
    ids: set[int],
    texts: Sequence[str],
) -> Generation:
    rows = _rows(state, first, first + max_tokens)
    log_p = np.asarray(state.log_p)
    said, ended = [], []
    for row in rows:
        stopped = bool(row) and row[-1] in ids
        whole = "" if subject.tokenizer is None else readable(subject, row[:-1] if stopped else row, whole=True)
        place = end_at(whole, texts)
        said.append(whole if place is None else whole[:place])
        ended.append("stop" if place is not None else "end" if stopped else "length")
    return Generation(
        tuple(map(tuple, rows)),
        tuple(said) if subject.tokenizer is not None else (),
        tuple(tuple(float(p) for p in log_p[row, first : first + len(own)]) for row, own in enumerate(rows)),
        tuple(ended),
        tuple(map(tuple, prompts)),
    )
