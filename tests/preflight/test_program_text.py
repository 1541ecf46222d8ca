"""The reader of compiled text against a text whose arrays were counted by hand, and against compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinterp.preflight.program_text import arrays, exchanges, numbers_of, shape_of, size_of, sorts
from jaxinterp.training.mesh import make_mesh

TEXT = """
  %x = f32[8,4]{1,0} parameter(0), metadata={op_name="x"}
  %s = (s32[96]{0}, f32[96]{0}) sort(%i, %v), dimensions={0}, to_apply=%less
  %r = bf16[2,4]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%sort
  %g.1 = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%x), replica_groups={{0,1}}
  %g.2 = f32[16,4]{1,0} all-gather-done(%g.1)
  %t = (f32[3]{0}, pred[5]{0}) all-reduce(%a, %b), to_apply=%add
  %c = f32[] constant(0)
"""


def test_a_text_counted_by_hand():
    assert arrays(TEXT) == [
        "f32[8,4]", "s32[96]", "f32[96]", "bf16[2,4]", "f32[16,4]", "f32[3]", "pred[5]",
    ]  # fmt: skip
    assert exchanges(TEXT) == [
        ("reduce-scatter", ("bf16[2,4]",)),
        ("all-gather", ("f32[16,4]",)),  # the start's operand is left out, its done half not counted again
        ("all-reduce", ("f32[3]", "pred[5]")),
    ]
    assert sorts(TEXT) == [(96,)]


@pytest.mark.parametrize(
    ("array", "shape", "size"),
    [("f32[8,128]", (8, 128), 4096), ("bf16[3]", (3,), 6), ("pred[7]", (7,), 7), ("c64[2]", (2,), 16),
     ("f8e4m3fn[5]", (5,), 5), ("f64[]", (), 8), ("u16[2,2,2]", (2, 2, 2), 16)],
)  # fmt: skip
def test_sizes(array, shape, size):
    assert (shape_of(array), size_of(array), size_of(f"({array}{{0}}, {array})")) == (shape, size, 2 * size)
    assert numbers_of(array) == max(1, jnp.zeros(shape).size)


def test_arrays_of_a_lowered_program():
    text = jax.jit(lambda x: (x @ x.T).astype(jnp.bfloat16)).lower(jnp.ones((5, 3))).as_text()
    assert {"f32[5,3]", "f32[3,5]", "f32[5,5]", "bf16[5,5]"} <= set(arrays(text))


def test_a_compiled_program_on_a_mesh():
    """A sum over the rows of a matrix that lies in eight parts is one all-reduce of its columns; a sort is found."""
    mesh = make_mesh(8, 1)
    x = jax.device_put(jnp.ones((16, 6)), NamedSharding(mesh, PartitionSpec("data")))
    summed = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    assert exchanges(summed.lower(x).compile().as_text()) == [("all-reduce", ("f32[6]",))]
    assert exchanges(jax.jit(lambda x: 2 * x).lower(x).compile().as_text()) == []
    assert sorts(jax.jit(jnp.sort).lower(jnp.ones(12)).compile().as_text()) == [(12,)]
