"""The PyTorch sampler: nothing that a CUDA graph cannot capture, and equal answers however it runs."""

import concurrent.futures
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from golden_kits import Kit, load_kit
from meta_device import DEVICE, NothingWaits
from openpi.models.gemma_config import get_config
from openpi.models_pytorch import gemma, loading
from openpi.policies import graphs_pytorch, sampler_pytorch
from openpi.policies.policy import Policy
from openpi.policies.sampler_pytorch import PytorchSampler
from openpi.serving.model_thread import Batching, Item, Job, ModelThread

PATIENCE_S = 60


@pytest.fixture(scope="module", params=["pi0", "pi05", "pi0_lora"])
def kit(request: pytest.FixtureRequest, golden: Path) -> Kit:
    return load_kit(golden / request.param)


def sampler_of(kit: Kit, **options: Any) -> PytorchSampler:
    return PytorchSampler(loading.from_tree(kit.config, kit.params), device="cpu", **options)


def inputs_of(kit: Kit, row: slice = slice(None), **options: bool) -> dict[str, Any]:
    def part(value: Any) -> Any:
        return {key: part(item) for key, item in value.items()} if isinstance(value, dict) else value[row]

    return part(kit.observation(**options))


def test_weights_that_are_fused_are_given_up_one_module_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (gemma.Mlp(get_config("dummy")) for _ in range(2))
    old, fuse = weakref.ref(first.gate_proj.weight), second.fuse
    seen: list[object] = []
    monkeypatch.setattr(second, "fuse", lambda: (seen.append(old()), fuse()))
    sampler_pytorch._fuse(nn.Sequential(first, second))
    assert seen == [None] and second.gate_up_proj is not None


# --- what a CUDA graph captures -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dropped", [(), ("right_wrist_0_rgb",)])
def test_sampling_has_nothing_that_a_capture_forbids(kit: Kit, dropped: tuple[str, ...]) -> None:
    sampler, inputs = sampler_of(kit), inputs_of(kit)
    for key in dropped:
        del inputs["image"][key]
        inputs["image_mask"][key] = None
    host = sampler_pytorch.host_tensors(inputs) | {"noise": torch.as_tensor(kit.inputs["sample_noise"])}
    sampler.model.to(DEVICE)
    run = sampler._of_flow(dropped, ())
    on_device = {key: value.to(DEVICE) for key, value in host.items()}
    with NothingWaits() as seen:
        actions = run(on_device)
    assert actions.shape == host["noise"].shape and actions.device == DEVICE
    assert seen.num_operations > 1000


FORBIDDEN: dict[str, Callable[[Tensor], Any]] = {
    "numbers of the host": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "a transfer to the device": lambda x: x + torch.ones(2).to(x.device),
    "a transfer to the host": lambda x: x.cpu(),
    "a number read": lambda x: x.sum().item(),
    "a branch": lambda x: x if x.all() else -x,
    "a shape that depends on numbers": lambda x: x[x > 0],
    "random numbers": lambda x: torch.randn(2, device=x.device),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_a_capture_forbids_would_be_found(what: str) -> None:
    on_device = torch.ones(2, device=DEVICE)
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), NothingWaits():
        FORBIDDEN[what](on_device)


@given(st.lists(st.tuples(st.sampled_from([np.uint8, bool, np.int32, np.float32]), st.integers(1, 700)), min_size=1))
def test_inputs_lie_side_by_side_in_one_buffer(fields: list[tuple[Any, int]]) -> None:
    rng = np.random.default_rng(0)
    values = {str(i): torch.as_tensor(rng.integers(0, 2, size).astype(kind)) for i, (kind, size) in enumerate(fields)}
    buffer = torch.zeros(graphs_pytorch.num_bytes(values), dtype=torch.uint8)
    places = graphs_pytorch.within(buffer, values)
    for key, value in values.items():
        places[key].copy_(value)
    for key, value in graphs_pytorch.within(buffer.clone(), values).items():
        assert value.dtype == values[key].dtype and torch.equal(value, values[key])
        assert value.storage_offset() * value.element_size() % 16 == 0


# --- answers ------------------------------------------------------------------------------------------------------


def test_calls_leave_nothing_behind_for_the_next(kit: Kit) -> None:
    sampler, noise = sampler_of(kit), kit.inputs["sample_noise"]
    first = sampler.sample(inputs_of(kit), noise)
    np.testing.assert_allclose(first, kit.outputs["sampled_actions_10"], atol=1e-4)
    other = sampler.sample(inputs_of(kit, all_cameras=True), noise)
    np.testing.assert_allclose(other, kit.outputs["sampled_actions_10_all_cameras"], atol=1e-4)
    np.testing.assert_array_equal(sampler.sample(inputs_of(kit), noise), first)


def test_of_many_kinds_of_inputs_the_one_used_longest_ago_is_forgotten(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sampler_pytorch, "_MAX_PROGRAMS", 2)
    sampler, noise = sampler_of(kit), kit.inputs["sample_noise"]
    rows = (slice(0, 1), slice(0, 2))
    expected = [sampler.sample(inputs_of(kit, row), noise[row], num_steps=1) for row in rows]
    kept = sampler._programs.signatures()
    assert not caplog.text
    sampler.sample(inputs_of(kit, rows[0]), noise[rows[0]], num_steps=1)
    sampler.sample(inputs_of(kit, rows[0]), noise[rows[0]], num_steps=2)
    assert "inputs of more than 2 kinds" in caplog.text
    left = sampler._programs.signatures()
    assert kept[0] in left and kept[1] not in left and len(left) == 2
    for row, before in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(sampler.sample(inputs_of(kit, row), noise[row], num_steps=1), before)


def test_the_parts_of_a_call_are_the_call(kit: Kit) -> None:
    sampler, noise, row = sampler_of(kit), kit.inputs["sample_noise"], slice(0, 1)
    program = sampler.program(inputs_of(kit, row), noise[row], num_steps=1)
    for step in (program.send, program.run, program.wait, program.run):
        step()
    actions = program.fetch()
    np.testing.assert_array_equal(actions, sampler.sample(inputs_of(kit, row), noise[row], num_steps=1))
    np.testing.assert_array_equal(actions, program())


class HeldGraphs:
    """In place of CUDA graphs where there is no GPU: functions are run as they are. Making one for several waits."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_making, self.may_go_on = device, threading.Event(), threading.Event()

    def capture(self, run: Callable[[dict[str, Tensor]], Tensor], example: dict[str, Tensor]) -> Any:
        if len(example["state"]) > 1:
            self.is_making.set()
            assert self.may_go_on.wait(PATIENCE_S)
        return graphs_pytorch.Direct(run, self.device)


def test_weights_that_give_nan_are_refused_when_the_model_is_warmed_up(golden: Path) -> None:
    kit = load_kit(golden / "pi05")
    sampler = sampler_of(kit)
    bias = dict(sampler.model.named_parameters())["action_out_proj.bias"]
    with torch.no_grad():
        bias[1] = torch.nan
    with pytest.raises(ValueError, match="gives NaN or infinity for an observation made up to warm it up"):
        sampler.warm_up(inputs_of(kit, slice(0, 1)), num_steps=1)


def test_a_server_answers_while_the_graph_for_its_batches_is_made_and_then_runs_them_together(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = load_kit(golden / "pi05")
    monkeypatch.setattr(sampler_pytorch, "Graphs", HeldGraphs)
    sampler = sampler_of(kit, uses_graphs=True)
    policy = Policy(sampler, sample_kwargs={"num_steps": 1})
    observation = inputs_of(kit, 0)
    policy.warm_up(observation)
    sizes: list[int] = []
    thread = ModelThread(Batching(), on_batch=lambda size, seconds: sizes.append(size))
    thread.load(lambda: policy).result(PATIENCE_S)

    def ask(count: int) -> list[Any]:
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        thread.submit(Job([Item(observation)] * count), lambda value, error: answer.set_result(error or value.results))
        return answer.result(PATIENCE_S)

    ask(4)
    graphs: Any = sampler._graphs
    assert graphs.is_making.wait(PATIENCE_S)
    ask(1)
    assert set(sizes) == {1} and policy.batch_sizes == (1,)
    graphs.may_go_on.set()
    thread._compiling.join(PATIENCE_S)  # type: ignore[union-attr]
    assert policy.batch_sizes == (1, 4)
    answers = ask(3)
    assert sizes[-1] == 3 and all(np.isfinite(answer["actions"]).all() for answer in answers)
    assert thread.finish(PATIENCE_S)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_for_a_batch_is_captured_while_others_are_replayed(kit: Kit) -> None:
    sampler = PytorchSampler(loading.from_tree(kit.config, kit.params), device="cuda")
    noise, expected = kit.inputs["sample_noise"], kit.outputs["sampled_actions_10"]
    one, two = slice(0, 1), slice(0, 2)
    sampler.warm_up(inputs_of(kit, one))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        ready = threads.submit(sampler.warm_up, inputs_of(kit, two))
        while not ready.done():
            np.testing.assert_allclose(sampler.sample(inputs_of(kit, one), noise[one]), expected[one], atol=1e-3)
        ready.result()
    for row in (two, one, two):
        np.testing.assert_allclose(sampler.sample(inputs_of(kit, row), noise[row]), expected[row], atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_replays_what_was_captured_for_other_inputs(kit: Kit) -> None:
    sampler = PytorchSampler(loading.from_tree(kit.config, kit.params), device="cuda")
    sampler.warm_up(inputs_of(kit, all_cameras=True))
    for row in (slice(0, 1), slice(1, 2), slice(0, 1)):
        actions = sampler.sample(inputs_of(kit, row), kit.inputs["sample_noise"][row])
        np.testing.assert_allclose(actions, kit.outputs["sampled_actions_10"][row], atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_that_share_their_memory_are_replayed_in_any_order(kit: Kit) -> None:
    sampler, noise = (
        PytorchSampler(loading.from_tree(kit.config, kit.params), device="cuda"),
        kit.inputs["sample_noise"],
    )
    rows = (slice(0, 1), slice(0, 2))
    for row in rows:
        sampler.warm_up(inputs_of(kit, row))
    for row in (*rows, *reversed(rows), *rows):
        for all_cameras, name in ((False, "sampled_actions_10"), (True, "sampled_actions_10_all_cameras")):
            actions = sampler.sample(inputs_of(kit, row, all_cameras=all_cameras), noise[row])
            np.testing.assert_allclose(actions, kit.outputs[name][row], atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_sampler_answers_while_others_are_made_ready(kit: Kit) -> None:
    """As in a server that loads further models."""
    first, *others = (PytorchSampler(loading.from_tree(kit.config, kit.params), device="cuda") for _ in range(3))
    first.warm_up(inputs_of(kit))
    noise, expected = kit.inputs["sample_noise"], kit.outputs["sampled_actions_10"]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        ready = [threads.submit(other.warm_up, inputs_of(kit)) for other in others]
        while not all(future.done() for future in ready):
            np.testing.assert_allclose(first.sample(inputs_of(kit), noise), expected, atol=1e-3)
        for future in ready:
            future.result()
    for other in others:
        np.testing.assert_allclose(other.sample(inputs_of(kit), noise), expected, atol=1e-3)
