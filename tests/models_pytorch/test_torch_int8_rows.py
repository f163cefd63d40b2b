"""Frozen matrices in eight bits: exact once rounded, and bfloat16 to whoever computes with them."""

import math
import re

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from openpi.models_pytorch.int8_rows import LARGEST, Int8Rows, encoded

MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-(2.0**99), 2.0**99, width=32) | st.floats(-1, 1, width=32),
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(weight: Tensor) -> Int8Rows:
    rows = Int8Rows.empty(*weight.shape, device="cpu")
    with torch.no_grad():
        rows.copy_(weight)
    return rows


@hypothesis.given(MATRICES)
def test_what_was_rounded_once_is_not_rounded_again(values: np.ndarray) -> None:
    weight = torch.from_numpy(values)
    rows = rounded(weight)
    step = rows.steps.float()
    assert bool(((rows.decoded().float() - weight).abs() <= step / 2).all())
    largest = weight.abs().amax(dim=1, keepdim=True)
    is_told = largest > 1e-30  # below, bfloat16 has no such steps
    assert bool((step <= largest / 63.5)[is_told].all()), "all of the eight bits are used"
    codes, steps = encoded(rows.decoded())
    decoded_again = codes.to(steps.dtype) * steps
    assert torch.equal(decoded_again, rows.decoded())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_none(value: float) -> None:
    weight = random(3, 4)
    weight[1, 2] = value
    found = rounded(weight).decoded()
    assert bool(found[1].isnan().any()) and bool(found[[0, 2]].isfinite().all())


def test_products_are_those_of_the_rounded_weights_and_keep_none_of_them() -> None:
    weight = nn.Parameter(rounded(random(6, 8)), requires_grad=False)
    plain = weight.decoded()
    kept: list[type] = []
    results = []
    for used in (weight, plain):
        x = random(2, 3, 8, seed=1, dtype=torch.bfloat16).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(type(t)), t)[1], lambda t: t):
            y = F.linear(x, used.to(x.dtype))
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach(), grad))
    assert kept[0] is Int8Rows
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_table_decodes_the_rows_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    table, indices = rounded(random(50, 4)), torch.tensor([[3, 3, 49], [0, 1, 2]])
    expected = table.decoded()[indices]
    sizes: list[int] = []
    decoded = Int8Rows.decoded
    monkeypatch.setattr(Int8Rows, "decoded", lambda self: sizes.append(len(self)) or decoded(self))
    assert torch.equal(F.embedding(indices, table), expected)
    assert sizes == [6]


def test_rows_are_filled_part_by_part_moved_and_read() -> None:
    weight = random(7, 5)
    module = nn.Linear(5, 7, bias=False, device="meta")
    module.weight = nn.Parameter(Int8Rows.empty(7, 5, device="meta"), requires_grad=False)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for start in (0, 3, 6):
            module.weight[start : start + 3].copy_(weight[start : start + 3])
    expected = rounded(weight).decoded()
    assert torch.equal(module.weight.detach().to("cpu", copy=True), expected)
    norm = torch._foreach_norm([module.weight, expected], dtype=torch.float32)
    assert norm[0] == norm[1]
    changes = {
        "normal_.default": lambda: module.weight.normal_(),
        "_foreach_mul_.Scalar": lambda: torch._foreach_mul_([module.weight], 2.0),
        "neg.out": lambda: torch.neg(expected, out=module.weight),
    }
    for name, change in changes.items():
        with pytest.raises(NotImplementedError, match=re.escape(f"{name} would change a frozen matrix")):
            change()
    assert module.weight.codes.nbytes + module.weight.steps.nbytes == 7 * 5 + 2 * 7


def test_a_compiler_sees_two_tensors() -> None:
    weight = nn.Parameter(rounded(random(6, 8)), requires_grad=False)
    x = random(3, 8, seed=1, dtype=torch.bfloat16).requires_grad_()

    def call(x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight.to(x.dtype)))

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for function in (call, compiled):
        torch.testing.assert_close(function(x), call(x))
        torch.testing.assert_close(
            torch.autograd.grad(function(x).sum(), x)[0], torch.autograd.grad(call(x).sum(), x)[0]
        )
    assert int(weight.codes.abs().max()) <= LARGEST
