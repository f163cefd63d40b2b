"""Kernels written here, in Triton's interpreter or on a GPU, and the choice of attention: equal to PyTorch's."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paths
from golden_kits import load_kit
from openpi.models.gemma_config import GemmaConfig
from openpi.models_pytorch import attention, fusion, gemma, loading
from openpi.policies.sampler_pytorch import PytorchSampler

pytest.importorskip("triton")
from openpi.models_pytorch import attention_kernels

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
# The interpreter has no bfloat16; on a GPU each variant is compiled, in seconds.
DTYPES = [torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]
pytestmark = [pytest.mark.gpu] if ON_GPU else []


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# --- attention ----------------------------------------------------------------------------------------------------


def attention_inputs(key_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values lie side by side, as they come from one product; a row attends to nothing."""
    q, both = random(2, 3, 4, 16, dtype=dtype), random(2, 21, 2 * key_heads, 16, seed=1, dtype=dtype)
    mask = random(2, 3, 21, seed=2) > -0.3
    mask[0, 0] = False
    bias = gemma.additive(mask, torch.float32)
    return q, both[:, :, :key_heads], both[:, :, key_heads:], bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key_heads", "split"), [(1, 16), (2, None)])
def test_attention_by_triton_is_the_plain_one(dtype: torch.dtype, key_heads: int, split: int | None) -> None:
    q, k, v, bias = attention_inputs(key_heads, dtype)
    for given in (bias, None):
        found = attention_kernels.attend(q, k, v, given, attention_kernels.Tiling(16, 16, split, 4))
        expected = attention.plain(q.float(), k.float(), v.float(), given)
        assert found.is_contiguous() and found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.skipif(ON_GPU, reason="tests without a GPU")
def test_kernels_fit_the_cards_that_they_are_for() -> None:
    """Compiled for them by Triton, at the sizes of pi0.5: 3090s (4090s and 5090s have no more memory) and H100s."""
    shared_bytes = {86: 99 << 10, 90: 227 << 10}
    command = [sys.executable, paths.SUPPORT / "triton_targets.py", json.dumps([*shared_bytes.items()])]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({(one["kernel"], one["capability"]) for one in found}) == 2 * 5
    assert not [one for one in found if one["shared"] > shared_bytes[one["capability"]]]
    assert not [one for one in found if one["stack"] > 64], "registers do not hold what a thread works on"


@pytest.mark.parametrize("name", ["folded"])
def test_sampled_actions_are_those_recorded_whatever_makes_the_attention(
    name: str, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = load_kit(golden / "pi05")
    plain = attention.plain
    num_calls = 0

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return (plain if k.shape[2] > 1 else getattr(attention, name))(q, k, v, bias)

    monkeypatch.setattr(attention, "attend", attend)
    sampler = PytorchSampler(loading.from_tree(kit.config, kit.params), device="cpu")
    actions = sampler.sample(kit.observation(), kit.inputs["sample_noise"])
    np.testing.assert_allclose(actions, kit.outputs["sampled_actions_10"], atol=1e-4)
    assert num_calls > 10


@torch.no_grad()
def test_the_fastest_that_computes_the_same_is_chosen_once_for_a_shape(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "openpi")
    monkeypatch.setattr(attention, "_chosen", {})
    calls: list[str] = []

    def counted(name: str, *args: Any, fails: bool = False, factor: float = 1.0) -> Tensor:
        calls.append(name)
        if fails:
            raise RuntimeError("no kernel")
        return factor * attention.plain(*args)

    found = {
        "plain": functools.partial(counted, "plain"),
        "fast": functools.partial(counted, "fast"),
        "absent": functools.partial(counted, "absent", fails=True),
        "wrong": functools.partial(counted, "wrong", factor=1.1),
    }
    seconds = {"plain": 2.0, "fast": 1.0}
    monkeypatch.setattr(attention, "candidates", lambda *args: found)
    monkeypatch.setattr(attention, "_seconds", lambda call, device: call() is None or seconds[calls[-1]])
    q, k, v, bias = attention_inputs(1, torch.float32)
    expected = attention.plain(q, k, v, bias)
    torch.testing.assert_close(attention.fastest(q, k, v, bias), expected)
    assert not calls, "nothing is measured while a robot waits"
    with attention.measuring():
        torch.testing.assert_close(attention.fastest(q, k, v, bias), expected)
    assert "by fast" in caplog.text and "wrong is off by" in caplog.text
    calls.clear()
    traced = torch.compile(attention.fastest, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(q, k, v, bias), expected)
    assert calls == ["fast"]


# --- what lies between products -----------------------------------------------------------------------------------


def both_ways(call: Any, patch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Plain, and by the kernels."""
    patch.setattr(fusion, "applies", lambda x: False)
    plain = call()
    seen: list[Tensor] = []
    patch.setattr(fusion, "applies", lambda x: seen.append(x) is None)
    found = call()
    assert seen
    return plain, found


def norm_of(width: int, *, is_adaptive: bool) -> gemma.RMSNorm:
    norm = gemma.RMSNorm(width, is_adaptive=is_adaptive)
    for i, parameter in enumerate(norm.parameters()):
        parameter.data = random(*parameter.shape, seed=i + 3)
    return norm


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cond", [None, (2, 24), (1, 1, 72), (2, 3, 72)])
def test_norms_with_and_without_a_residual_are_the_plain_ones(
    cond: tuple[int, ...] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = norm_of(24, is_adaptive=cond is not None)
    given = None if cond is None else random(*cond, seed=9, dtype=dtype)
    x, y = random(2, 4, 24, dtype=dtype)[:, 1:], random(2, 3, 24, seed=1, dtype=dtype)
    gate = random(1, 1, 24, seed=2, dtype=dtype) if cond is not None else None

    def call() -> list[Tensor | None]:
        return [*norm(x, given), *norm.of_sum(x, y, gate, given)]

    for plain, found in zip(*both_ways(call, monkeypatch), strict=True):
        if plain is None:
            assert found is None
        else:
            torch.testing.assert_close(found, plain, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_and_gates_are_the_plain_ones(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(2, 3, 5, 8, dtype=dtype)[:, :, :3]  # queries and keys, beside values
    sin, cos = gemma.rotations(torch.tensor([[0, 1, 2, 7], [3, 4, 900, 901]], device=DEVICE), 8)
    gate_up = random(2, 3, 20, seed=1, dtype=dtype)

    def call() -> list[Tensor]:
        return [gemma.rope(x, sin[:, 1:], cos[:, 1:]), gemma.geglu(gate_up)]

    for plain, found in zip(*both_ways(call, monkeypatch), strict=True):
        torch.testing.assert_close(found, plain, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@torch.no_grad()
def test_a_layer_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GemmaConfig(16, depth=1, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=16)
    language = gemma.Gemma([config], adaptive=(True,))
    for i, parameter in enumerate(language.parameters()):
        parameter.data = 0.3 * random(*parameter.shape, seed=i)
    for module in list(language.modules()):
        if isinstance(module, (gemma.Attention, gemma.Mlp)):
            module.fuse()
    x, cond = random(1, 3, 16), random(1, 16, seed=1)
    places = language.places(torch.arange(3, device=DEVICE)[None], random(1, 3, 3) > -9, torch.float32)

    def call() -> Tensor:
        out = language([x], places, adarms_cond=[cond], dtype=torch.float32, remat="none")[0][0]
        assert out is not None
        return out

    torch.testing.assert_close(*reversed(both_ways(call, monkeypatch)), rtol=1e-4, atol=1e-4)


def test_where_gradients_are_wanted_or_there_is_no_gpu_nothing_is_replaced() -> None:
    assert not fusion.applies(nn.Parameter(random(1, 2)))
    with torch.no_grad():
        assert fusion.applies(random(1, 2)) is ON_GPU
