"""What the suite costs: CPU seconds of every test, the slowest printed, and a run that fails where a fast test is slow.

CPU seconds (user and system, of the worker and the processes that it waited for) rather than wall time, since machines
and their load differ. A fixture that several tests share counts as the setup of the first one.
"""

import os
from collections import defaultdict

import pytest

LIMIT = 15.0
"""CPU seconds of a phase (setup, call) of a test that is not marked slow, above which the run fails."""

SHOWN = 20

_marked = 0.0


def cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    return sum(os.times()[:4])


def pytest_runtest_logstart():
    global _marked
    _marked = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Called after each phase, in the process that ran it; attributes of a report travel to the controller."""
    global _marked
    report = yield
    now = cpu_seconds()
    report.cpu_seconds, report.is_slow = now - _marked, "slow" in item.keywords
    _marked = now
    return report


def phases(reporter):
    """(CPU seconds, phase and name, whether it is a slow proof), greatest first."""
    reports = [one for several in reporter.stats.values() for one in several if hasattr(one, "cpu_seconds")]
    rows = [(one.cpu_seconds, f"{one.when} {one.nodeid}", one.is_slow) for one in reports]
    return sorted(rows, reverse=True)


def pytest_terminal_summary(terminalreporter):
    rows = phases(terminalreporter)
    if not rows:
        return
    files = defaultdict(float)
    for seconds, name, _ in rows:
        files[name.partition(" ")[2].partition("::")[0]] += seconds
    terminalreporter.section(f"CPU seconds: {sum(files.values()):.0f} in all")
    for seconds, name, _ in rows[:SHOWN]:
        terminalreporter.line(f"{seconds:7.1f}  {name}")
    terminalreporter.line(
        "dearest files: "
        + ", ".join(
            f"{file} {seconds:.0f}" for file, seconds in sorted(files.items(), key=lambda pair: -pair[1])[: SHOWN // 2]
        )
    )
    for name in too_slow(rows):
        terminalreporter.line(f"FAILED  over {LIMIT:.0f} CPU seconds and not marked slow: {name}")


def too_slow(rows):
    """The names of fast tests above the limit."""
    return [name for seconds, name, is_slow in rows if seconds > LIMIT and not is_slow]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and too_slow(phases(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
