"""`save` and `load_decomposition`: one pair of functions for every kind, and nothing overwritten silently."""

import json
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float
from safetensors.numpy import load_file, save_file

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.cross_layer import PerLayer
from jaxinterp.decompositions.cross_layer_files import load_cross_layer, save_cross_layer
from jaxinterp.decompositions.files import load_dictionary, save_dictionary
from jaxinterp.decompositions.modules_on_disk import load_module, save_module
from jaxinterp.decompositions.plain import PrincipalComponents
from jaxinterp.decompositions.saved import load_decomposition, save
from jaxinterp.methods import CrossLayerTranscoder, JumpReLUSparseAutoencoder, SkipTranscoder
from tests.decompositions import older


class WithFunction(eqx.Module):
    function: Callable


ROWS = jax.random.normal(jax.random.key(0), (16, 4))


def made(method, reads="blocks/0/mlp/in", writes="blocks/0/mlp/out"):
    names = [name for each in (reads, writes) for name in ([each] if isinstance(each, str) else each)]
    batch = make_batch(dict.fromkeys(names, ROWS), jnp.ones(16), Sites(reads, writes))
    return method.recipe(10).init(jax.random.key(1), batch, None).decomposition


def kinds():
    skip = made(SkipTranscoder(features=8, k=2))
    yield skip
    yield made(JumpReLUSparseAutoencoder(features=8), "blocks/0/mlp/out")
    two = tuple(f"blocks/{layer}/mlp/in" for layer in (0, 1)), tuple(f"blocks/{layer}/mlp/out" for layer in (0, 1))
    yield made(CrossLayerTranscoder(features=8), *two)
    yield PerLayer((skip, made(SkipTranscoder(features=4, k=2), "blocks/1/mlp/in", "blocks/1/mlp/out")))


def test_every_kind_comes_back_and_nothing_is_overwritten_silently(tmp_path):
    for number, decomposition in enumerate(kinds()):
        folder = save(decomposition, tmp_path / str(number))
        back = load_decomposition(folder)
        assert type(back) is type(decomposition) and back.sites == decomposition.sites
        leaves = named_leaves(back)
        for name, leaf in named_leaves(decomposition).items():
            np.testing.assert_array_equal(leaves[name], leaf, err_msg=name)
        with pytest.raises(UserError, match="is not empty: pass overwrite=True"):
            save(decomposition, folder)
        save(decomposition, folder, overwrite=True)


class Signs(eqx.Module):
    """A kind of one's own: an array, a number, words, and another module inside."""

    rows: Float[Array, "features d"]
    inner: PrincipalComponents
    power: float = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    nothing: None = None


SIGNS = Signs(ROWS[:3], PrincipalComponents(ROWS[:2], ROWS[0], Sites("a/out", "a/out")), 0.5, ("x", "y"))


def test_a_kind_of_ones_own_is_saved_and_its_class_must_be_given(tmp_path):
    folder = save(SIGNS, tmp_path / "signs")
    back = load_decomposition(folder, kinds=(Signs,))
    assert jax.tree.structure(back) == jax.tree.structure(SIGNS), "also all that is static"
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(SIGNS), strict=True))
    with pytest.raises(UserError, match=r"'Signs' in .* is unknown: pass its class in kinds"):
        load_decomposition(folder)
    mode = (folder / "decomposition.safetensors").stat().st_mode & 0o777
    (tmp_path / "plain").touch()
    assert mode == (tmp_path / "plain").stat().st_mode & 0o777, "the user's umask"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda file, arrays: file["tree"]["fields"].pop("power"),
            r"has other fields than this version's: \['power'\]",
        ),
        (lambda file, arrays: arrays.pop("rows"), "array 'rows' is missing"),
        (lambda file, arrays: arrays.update(more=arrays["rows"]), r"unknown arrays \['more'\]"),
        (lambda file, arrays: arrays.update(rows=arrays["rows"][0]), "rows is float32"),
        (lambda file, arrays: file["tree"]["fields"].update(rows={"array": "inner/mean"}), "array 'rows' is missing"),
        (lambda file, arrays: file.update(format=9), "format=9 of .* is not 2"),
        (lambda file, arrays: file.pop("tree"), "is damaged: KeyError"),
    ],
)
def test_damage_is_told(tmp_path, change, words):
    folder = save(SIGNS, tmp_path / "signs")
    path = folder / "decomposition.json"
    file, arrays = json.loads(path.read_text()), load_file(folder / "decomposition.safetensors")
    change(file, arrays)
    path.write_text(json.dumps(file))
    save_file(arrays, folder / "decomposition.safetensors")
    with pytest.raises(UserError, match=words):
        load_decomposition(folder, kinds=(Signs,))


def test_what_older_versions_wrote_still_loads(tmp_path):
    skip, _, across, layers = kinds()
    folders = {
        older.save_dictionary(skip, tmp_path / "dictionary"): skip,
        older.save_cross_layer(across, tmp_path / "across"): across,
        tmp_path / "layers": layers,
    }
    for number, part in enumerate(layers.parts):
        older.save_dictionary(part, tmp_path / "layers" / str(number))
    (tmp_path / "layers" / "per_layer.json").write_text('{"format": 1, "parts": 2}')
    for folder, saved in folders.items():
        assert eqx.tree_equal(load_decomposition(folder), saved)


def test_what_is_no_decomposition_is_told_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"a dict has no form on disk: .* of a Fit, its .decomposition"):
        save({"encoder": 1}, tmp_path / "x")
    with pytest.raises(UserError, match=r"field 'function' is a .*, which has no form on disk"):
        save(WithFunction(jnp.sin), tmp_path / "x")
    save(next(kinds()), tmp_path / "run" / "dictionary")
    with pytest.raises(UserError, match=r"no decomposition in .*run: .* Did you mean .*run/dictionary\?"):
        load_decomposition(tmp_path / "run")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "per_layer.json").write_text("{}")
    with pytest.raises(UserError, match=r"per_layer.json is damaged"):
        load_decomposition(tmp_path / "broken")


def test_every_writer_writes_the_one_form_and_every_reader_reads_it(tmp_path):
    skip, _, across, _ = kinds()
    directions = Prototype(ROWS[:3], 2)
    written = [
        (save_dictionary, load_dictionary, skip),
        (save_cross_layer, load_cross_layer, across),
        (save_module, partial(load_module, classes=(Prototype,)), directions),
    ]
    for write, read, saved in written:
        folder = write(saved, tmp_path / write.__name__)
        names = {path.name for path in folder.iterdir()}
        assert names == {"decomposition.json", "decomposition.safetensors"}, write.__name__
        assert eqx.tree_equal(read(folder), saved)
    assert eqx.tree_equal(load_module(older.save_module(directions, tmp_path / "m"), classes=(Prototype,)), directions)


class Prototype(eqx.Module):
    rows: Float[Array, "features d"]
    k: int = eqx.field(static=True)
