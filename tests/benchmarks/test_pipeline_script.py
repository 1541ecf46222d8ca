"""The benchmark of whole jobs in tiny: its arithmetic, its turns, its floors; what it says, not how long it takes."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import pipeline, pipeline_programs
from benchmarks.pipeline_job import Job, Turns
from benchmarks.timing import Round, Sample

TINY = Job(1, steps=2, seq=16, width=32, layers=3, d_mlp=48, heads=4, kv_heads=2, vocab=96)
TOKENS = {"jaxinterp": 400, "sparsify": 200, "saelens": 400, "harvest": 200} | dict.fromkeys(pipeline.PARTS[1:], 200)


def result(**cpu):
    """Two rounds, the second twice as slow in everything; wall seconds are twice the CPU seconds."""
    rounds = [
        Round({name: [Sample(2 * slow * each, slow * each)] for name, each in cpu.items()}, 0.0)._asdict()
        for slow in (1.0, 2.0)
    ]
    return {
        "job": {"layer": 15}, "tokens": {name: TOKENS[name] for name in cpu}, "rounds": rounds, "failures": [],
        "shape": {}, "load": [0.0, 0.0], "memory_mb": {"jaxinterp": 1234.0}, "dtypes": {}, "versions": {},
    }  # fmt: skip


BASE = {"jaxinterp": 8.0, "harvest": 2.5, "harvest matmuls": 2.0, "encoder": 0.5, "decoder": 0.5}
BASE |= {"encode": 0.6, "d values": 0.1, "d rows": 0.05, "adam": 0.1}


def test_ratios_are_by_the_token_and_by_the_round():
    """`fit` takes 8 s for 400 tokens, the floors 3 s for 200: a ratio of 4/3; sparsify takes 15 s for 200: 3.75."""
    found = result(**BASE, sparsify=15.0)
    assert pipeline.quotient(found, "jaxinterp", "floors") == pytest.approx((4 / 3, 4 / 3, 4 / 3))
    assert pipeline.quotient(found, "sparsify", "jaxinterp", "wall") == pytest.approx((3.75, 3.75, 3.75))
    held = pipeline.verdicts(found)
    assert [line.partition(":")[0] for line in held] == ["holds", "MISSED", "MISSED"]
    assert "harvest of 16 layers 1.25" in held[2] and "floors alone: 5.00" in held[0]


def test_what_the_floors_forbid_is_said():
    """SAELens at 8 s for 400 tokens: as fast as ours, and 4/3 of the floors: even they alone are not twice as fast."""
    assert pipeline.verdicts(result(**BASE, saelens=8.0))[0].startswith("MISSED, forbidden by its parts alone: 1.00")
    assert pipeline.verdicts(result(**BASE, saelens=14.0))[0].startswith("MISSED: 1.75")


def test_what_a_step_needs_besides_is_said():
    """3.4 s of parts for 3 s of floors leave room for 1.25; with .7 s for each of two gradients they do not."""
    held = pipeline.verdicts(result(**BASE))[0]
    assert held.startswith("MISSED: whole job 1.33") and held.endswith("its parts alone: 1.13")
    held = pipeline.verdicts(result(**BASE | {"d rows": 0.7}))[0]
    assert held.startswith("MISSED, forbidden by its parts alone: whole job 1.33") and held.endswith("alone: 1.57")


def test_a_run_stands_still_between_turns_and_its_errors_arrive():
    seen = []

    def function(turns):
        for number in range(3):
            seen.append(number)
            turns.pause()
        raise ValueError("the text is at its end")

    turns = Turns(function)
    assert seen == []
    turns.turn()
    assert seen == [0]
    turns.turn()
    assert seen == [0, 1]
    turns.turn()
    with pytest.raises(ValueError, match="at its end"):
        turns.turn()
    with pytest.raises(RuntimeError, match="more steps"):
        turns.turn()


def test_the_floor_has_every_matmul_of_the_layers_and_nothing_else():
    """Operations counted by the compiler's own reckoning of the traced program, and by hand."""
    model, tokens = jax.eval_shape(lambda: pipeline_programs.model(replace(TINY, layer=0))), 64
    x = jax.ShapeDtypeStruct((tokens // TINY.seq, TINY.seq, TINY.width), jnp.float32)
    traced = jax.make_jaxpr(pipeline_programs.layer_products, static_argnums=2)(model.blocks[0], x, TINY)
    products = [equation for equation in traced.eqns if equation.primitive.name == "dot_general"]
    counted = 0
    for equation in products:
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        counted += 2 * int(np.prod(equation.outvars[0].aval.shape)) * int(np.prod([left[axis] for axis in contracted]))
    assert len(products) == 9
    assert counted == replace(TINY, layer=0).operations(tokens)
    assert {equation.primitive.name for equation in traced.eqns} <= {"dot_general", "reshape", "slice", "transpose"}


@pytest.mark.slow
def test_the_dry_run_goes_through_everything(capsys, tmp_path):
    """Our whole job by `fit`, its turns, the harvest and all floors, of a tiny model, each in a process of its own."""
    file = tmp_path / "found.json"
    assert pipeline.main(["--dry", "--json", str(file)]) == 0
    (found,) = json.loads(file.read_text())["results"]
    assert not found["failures"] and found["tokens"]["jaxinterp"] == 3 * 64
    assert set(found["rounds"][0]["samples"]) == {"jaxinterp", *pipeline.PARTS}
    printed = capsys.readouterr().out
    assert "| sum of the floors |" in printed and "whole job" in printed and found["memory_mb"]["jaxinterp"] > 50
