"""A sample of benchmarks/fuzz.py: mutated files give UserErrors and nothing else; and the harness sees what it must."""

import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fuzz import FORBIDDEN, SPARE, Report, Seed, _one, fuzz, watched


@pytest.mark.parametrize("seed", [11, 12])
def test_mutated_files_are_refused_in_words(seed) -> None:
    without_exec = tuple(event for event in FORBIDDEN if event != "exec")  # the checks of types in tests use it
    report = fuzz(100, seed=seed, forbidden=without_exec)
    assert not report.failures
    assert report.refused.total() > 30 and report.read.total() > 10
    assert report.largest < SPARE


def test_the_harness_sees_other_errors_memory_and_code() -> None:
    import tracemalloc

    report = Report(Counter(), Counter(), [])
    tracemalloc.start()
    _one(Seed("a", (), lambda: 1 / 0), 0, report, "a")
    _one(Seed("b", (), lambda: np.zeros(SPARE, np.uint16)), 0, report, "b")
    tracemalloc.stop()
    assert "ZeroDivisionError" in report.failures[0] and "bytes beyond" in report.failures[1]

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.getcwd, ()

    data = pickle.dumps(Evil())
    with watched() as seen:
        pickle.loads(data)
    assert "pickle.find_class" in seen
    assert Path.cwd().is_dir()
