"""Imports without the garbage collector."""

import subprocess
import sys


def run(script):
    """What a script prints in a process of its own."""
    script = "import gc, sys\nfrom ekfac_dist.runtime.importing import importing\n" + script
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()


def test_nothing_is_collected_during_the_first_imports():
    script = """
with importing():
    print(gc.isenabled())
print(gc.isenabled(), gc.get_freeze_count() > 1000)
"""
    assert run(script) == ["False", "True", "True"]


def test_a_collector_that_was_turned_off_stays_off():
    script = """
gc.disable()
with importing():
    pass
print(gc.isenabled())
"""
    assert run(script) == ["False"]


def test_imports_that_fail_leave_the_collector_on():
    script = """
try:
    with importing():
        import no_such_package
except ImportError:
    print(gc.isenabled())
"""
    assert run(script) == ["True"]


def test_a_program_that_has_imported_torch_keeps_its_collector():
    script = """
import torch
with importing():
    print(gc.isenabled())
print(gc.get_freeze_count())
"""
    assert run(script) == ["True", "0"]
