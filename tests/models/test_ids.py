"""Ids and rows are compared where they meet: the largest id, not the number of ids."""

import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxinterp.core.errors import UserError
from jaxinterp.data import cache
from jaxinterp.data.activations import harvest_jit
from jaxinterp.data.text.documents import Document
from jaxinterp.data.token_files import read_token_file
from jaxinterp.data.tokens import encode_documents
from jaxinterp.methods import SkipTranscoder
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import BYTE_OF, tokenizer_from_file
from jaxinterp.models.ids import check_ids, token_rows
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.training.fit import fit
from tests.models.model_files import GOLDENS

CONFIG = TransformerConfig(
    vocab_size=61, d_model=8, layers=1, heads=1, kv_heads=1, head_dim=8, d_mlp=8, context=32, rotary_dimensions=8
)
MODEL = initialise(CONFIG, jax.random.key(0))


def windows(*rows):
    tokens = np.asarray(rows, np.int32)
    made = {"weight": np.ones(tokens.shape, np.float32), "document": np.zeros(tokens.shape, np.int32)}
    return [{"tokens": row} | {name: array[0] for name, array in made.items()} for row in tokens]


@pytest.mark.parametrize("wrong", [61, 62, 1_000_000, 2**31 - 1, -1, -100])
def test_an_id_without_a_row_is_refused_and_never_anothers_row(wrong):
    tokens = np.array([[1, 60, wrong]])
    with pytest.raises(UserError, match=rf"token id {wrong} at position \[0, 2\] has no row .* 0 to 60"):
        run(MODEL, tokens)
    inside = jax.jit(lambda tokens: run(MODEL, tokens).logits)(jnp.asarray(tokens))
    assert jnp.all(jnp.isnan(inside[:, 2]))
    # The plain index, which was used before, gives another token's row.
    assert jnp.all(jnp.isfinite(MODEL.embedding.token[jnp.asarray(tokens)]))
    check_ids(MODEL, np.array([[0, 60]]))


@pytest.mark.parametrize("wrong", [61, -1])
def test_text_of_another_tokenizer_is_refused_before_training_and_scoring(wrong):
    subject = Subject(MODEL, None, "small")
    text = grain.MapDataset.source(windows(*[[1, 2, 3, 4]] * 30, [1, 2, wrong, 3]))
    sizes = {"site": "blocks/0/mlp", "steps": 1, "batch_size": 8, "buffer_batches": 2}
    with pytest.raises(UserError, match=f"window 30: token id {wrong}"):
        fit(SkipTranscoder(features=8, k=2), subject, text, **sizes)
    batch = {name: np.stack([text[30][name]]) for name in ("tokens", "weight")}
    with pytest.raises(UserError, match=f"text: token id {wrong}"):  # what `score`, the probe and caches harvest with
        harvest_jit(MODEL, batch, ("blocks/0/mlp/in",))
    batch["tokens"] = np.array([[0, 1, 2, 60]], np.int32)
    assert jnp.all(jnp.isfinite(harvest_jit(MODEL, batch, ("blocks/0/mlp/in",)).arrays["blocks/0/mlp/in"]))


def byte_bpe(extra_vocabulary=None, special=()):
    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(BYTE_OF) | (extra_vocabulary or {}), merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return backend


def model_folder(tmp_path, backend, rows):
    """The Llama golden, with another number of rows and this tokenizer."""
    import shutil

    from safetensors.numpy import load_file, save_file

    where = tmp_path / "model"
    shutil.copytree(GOLDENS / "llama", where)
    tensors = load_file(where / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = np.resize(tensors[name], (rows, tensors[name].shape[1]))
    save_file(tensors, where / "model.safetensors")
    fields = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(fields | {"vocab_size": rows, "eos_token_id": None}))
    backend.save(str(where / "tokenizer.json"))
    return where


def test_added_ids_that_no_text_yields_pass_and_are_refused_where_they_come(tmp_path):
    """Gemma 3 1B: one id more than rows, `<image_soft_token>`."""
    backend = byte_bpe(special=["<|endoftext|>", "<image_soft_token>", "<audio_soft_token>"])
    subject = load(model_folder(tmp_path, backend, 257))
    assert (subject.tokenizer.vocab_size, subject.tokenizer.largest_id, token_rows(subject.model)) == (259, 258, 257)
    run(subject.model, np.array([subject.tokenizer.encode("text")]))
    with pytest.raises(UserError, match=r"token id 257 .* has no row"):
        run(subject.model, np.array([subject.tokenizer.encode("<image_soft_token>")]))


@pytest.mark.parametrize("case", ["gap", "end token", "wider"])
def test_ids_that_text_yields_need_rows(tmp_path, case):
    """A gap: 257 ids are not more than 257 rows, but the largest is 5000."""
    backend = {
        "gap": byte_bpe({"zz": 5000}),
        "end token": byte_bpe({"zz": 256}, special=["<|endoftext|>"]),
        "wider": byte_bpe({"zz": 256, "yy": 257}),
    }[case]
    with pytest.raises(UserError, match=r"ids up to (5000|257), but .* vocab_size=257 rows"):
        load(model_folder(tmp_path, backend, 257))


def test_a_tokenizer_with_gaps_reads_its_own_ids(tmp_path):
    """The uint16 cache turned id 70000 into 4464, and the tokenizer's own .bin file was refused."""
    byte_bpe({"Ġ70000": 70_000, "zz": 300}).save(str(tmp_path / "tokenizer.json"))
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 300, "c": 70_000}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "words.json"))
    tokenizer = tokenizer_from_file(tmp_path / "words.json")
    assert (tokenizer.vocab_size, tokenizer.largest_id) == (3, 70_000)
    documents = [Document("a b c c", "here")]
    cached = cache.through_cache(tmp_path / "cache", "content", documents, tokenizer, name="words")
    assert cached.document(0).tolist() == [0, 300, 70_000, 70_000] and cached.ids.dtype == np.uint32
    assert np.array_equal(cached.ids[:], encode_documents(documents, tokenizer, name="words").ids)
    np.asarray(cached.ids).tofile(tmp_path / "own.bin")
    assert read_token_file(tmp_path / "own.bin", tokenizer).document(0).tolist() == [0, 300, 70_000, 70_000]
    assert 70_000 % 2**16 == 4464  # what the narrower type makes of it
