"""`torch.compile`: nothing is left out of a program, there may be many, and they compute the same."""

import os
import subprocess
import sys

import pytest
import torch

import forked
import paths

SIDE = paths.SUPPORT / "compiled_side.py"


def run(*parts: str) -> None:
    forked.run([sys.executable, SIDE, *parts], preloads=forked.PYTORCH, check=True)


def test_without_a_break_programs_are_traced_for_any_number_of_shapes_and_compute_the_same() -> None:
    """Without the compiler proper: what is traced is run as it is."""
    run(
        *("actions,eager,pi0", "shapes,eager,10", "steps,aot_eager,dots"),
        *("continues,aot_eager,guided,vjp", "continues,eager,trained,vjp"),
    )


def test_a_server_that_compiles_nothing_does_not_load_the_compiler() -> None:
    """Which takes as long as PyTorch itself."""
    program = (
        "import sys, openpi.policies.sampler_pytorch, openpi.training.backends.pytorch.backend; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "torch._dynamo" not in done.stdout.split()


@pytest.mark.skipif("OPENPI_COMPILE" not in os.environ, reason="takes minutes and a C++ compiler: OPENPI_COMPILE=1")
@pytest.mark.parametrize(
    "part",
    [
        "actions,inductor,pi0",
        "actions,inductor,pi05",
        "shapes,inductor,10",
        "steps,inductor,full",
        "steps,inductor,dots",
        "steps,inductor,none",
    ],
)
def test_compiled_programs_compute_the_same(part: str) -> None:
    run(part)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_programs_are_captured_in_a_graph() -> None:
    run("actions,inductor,pi0,cuda", "actions,inductor,pi05,cuda")
    ways = ("guided,vjp", "guided,identity", "trained,vjp")
    run(*(f"continues,inductor,{way},cuda" for way in ways))
