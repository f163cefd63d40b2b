"""Counted work of a training sample and of an action chunk, with and without what `skip_unused` leaves out.

    JAX_PLATFORMS=cpu python benchmarks/flops.py [--report benchmarks/flops.md]

The traced program of the real train step (loss, gradients, update) and of sampling is walked, on abstract arrays of the
published sizes: nothing is computed, no memory is needed. Matrix products and convolutions count, two FLOPs per
multiplication; what rematerialisation computes again counts again; element-wise work, a per cent or so, does not.
"""

import argparse
import dataclasses
import datetime
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from openpi.models import compact
from openpi.models.compact import Extent
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.policies.robot_spec import find_spec
from openpi.serving.warm_up import example_observation
from openpi.shared.tree import unflatten
from openpi.training.backends.jax import step as step_jax
from openpi.training.config import TrainConfig, get_config

# --- counting -------------------------------------------------------------------------------------------------

_SMALL = 4096  # elements; known arrays up to here are followed, so that it is known which branch of a `cond` runs


def count(program: Any) -> int:
    """FLOPs of the matrix products and convolutions of a `ClosedJaxpr`.

    Loops count as often as they run. Of a conditional the branch counts that runs, where that follows from constants,
    as it does for the last layer of a scan; else the larger one.

    Raises:
        ValueError: a loop of unknown length.
    """
    return _Walk().run(program.jaxpr, program.consts, [None] * len(program.jaxpr.invars))[0]


class _Walk:
    """Follows a program with the values that are known; None = unknown.

    Attributes:
        undecided: a conditional was met whose branch is unknown.
    """

    def __init__(self) -> None:
        self.undecided = False

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> tuple[int, list[Any]]:
        """FLOPs, and the outputs as far as they are known."""
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*map(_small, consts), *args), strict=True))
        total = 0
        for eqn in jaxpr.eqns:
            inputs = [_small(v.val) if hasattr(v, "val") else known.get(v) for v in eqn.invars]
            flops, outputs = self._equation(eqn, inputs)
            total += flops
            known.update(zip(eqn.outvars, outputs, strict=True))
        return total, [_small(v.val) if hasattr(v, "val") else known.get(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list[Any]) -> tuple[int, list[Any]]:
        unknown = [None] * len(eqn.outvars)
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            return _dot(eqn), unknown
        if name == "conv_general_dilated":
            return _conv(eqn), unknown
        if name == "scan":
            return self._scan(eqn, inputs)
        if name == "cond":
            return self._cond(params["branches"], inputs)
        if name == "while":
            once, _ = self.run(params["body_jaxpr"].jaxpr, params["body_jaxpr"].consts, [None] * len(unknown))
            if once:
                raise ValueError("a while loop with matrix products: how often it runs is not in the program")
            return 0, unknown
        inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
        if inner is not None:
            is_closed = hasattr(inner, "consts")
            return self.run(inner.jaxpr if is_closed else inner, inner.consts if is_closed else (), inputs)
        if inputs and all(x is not None for x in inputs) and all(v.aval.size <= _SMALL for v in eqn.outvars):
            outputs = eqn.primitive.bind(*inputs, **params)
            return 0, [_small(x) for x in (outputs if eqn.primitive.multiple_results else [outputs])]
        return 0, unknown

    def _cond(self, branches: Sequence[Any], inputs: list[Any]) -> tuple[int, list[Any]]:
        index, *operands = inputs
        if index is not None:
            chosen = branches[int(np.clip(index, 0, len(branches) - 1))]
            return self.run(chosen.jaxpr, chosen.consts, operands)
        self.undecided = True
        found = [self.run(branch.jaxpr, branch.consts, operands) for branch in branches]
        return max(flops for flops, _ in found), [None] * len(found[0][1])

    def _scan(self, eqn: Any, inputs: list[Any]) -> tuple[int, list[Any]]:
        params = eqn.params
        body, length = params["jaxpr"], params["length"]
        num_consts, num_carry = _scan_sizes(eqn)
        consts, carry, xs = (
            inputs[:num_consts],
            inputs[num_consts : num_consts + num_carry],
            inputs[num_consts + num_carry :],
        )
        alone = _Walk()
        unknown = [None] * (len(carry) + len(xs))
        once, outputs = alone.run(body.jaxpr, body.consts, [*consts, *unknown])
        if not alone.undecided:
            return once * length, [None] * len(outputs)
        total, per_step = 0, {}
        for i in reversed(range(length)) if params["reverse"] else range(length):
            flops, outputs = self.run(
                body.jaxpr, body.consts, [*consts, *carry, *(None if x is None else x[i] for x in xs)]
            )
            total, carry, per_step[i] = total + flops, outputs[:num_carry], outputs[num_carry:]
        ys = zip(*(per_step[i] for i in range(length)), strict=True)
        return total, [*carry, *(np.stack(y) if all(v is not None for v in y) else None for y in ys)]


def _scan_sizes(eqn: Any) -> tuple[int, int]:
    """How many inputs of a `scan` are the same in each iteration, and how many after them are carried on; those that
    are left are sliced. Found by shapes: what the operation calls them differs between versions of JAX.
    """
    body = eqn.params["jaxpr"].jaxpr

    def num_alike(outer: list[Any], inner: list[Any]) -> int:
        return sum(a.aval.shape == b.aval.shape for a, b in zip(outer, inner, strict=True))

    num_carry = num_alike(eqn.outvars, body.outvars)
    return num_alike(eqn.invars, body.invars) - num_carry, num_carry


def _small(value: Any) -> Any:
    if isinstance(value, (bool, int, float, np.generic)):
        return np.asarray(value)
    is_plain = getattr(getattr(value, "dtype", None), "kind", "") in tuple("biuf")
    return np.asarray(value) if is_plain and math.prod(value.shape) <= _SMALL else None


def _dot(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _conv(eqn: Any) -> int:
    kernel, out_features = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[out_features]


# --- what is counted ------------------------------------------------------------------------------------------


def batch_spec(config: TrainConfig) -> dict[str, Any]:
    """A batch of one sample of the recipe's model, padded to the full."""
    observation, actions = config.model.inputs_spec(batch_size=1)
    return {**observation.to_dict(), "actions": actions}


def camera_masks(config: TrainConfig, sent: Sequence[str] | None = None) -> dict[str, bool]:
    """The model's cameras as the recipe's own robot transforms make them: whether each is unmasked.

    Args:
        sent: cameras in the data, under client keys; None = all that the robot knows.
    """
    data = dataclasses.replace(config.data, assets=dataclasses.replace(config.data.assets, assets_dir=None))
    robot = data.create(config.assets_dirs, config.model).data_transforms.inputs
    spec = find_spec(robot)
    assert spec is not None
    cameras = [camera for camera in spec.cameras if sent is None or camera.key in sent]
    sample = example_observation(cameras, spec.state)
    sample = unflatten(sample) if config.name.count("aloha") else sample
    for transform in robot:
        sample = transform(sample)
    return {key: bool(is_used) for key, is_used in sample["image_mask"].items()}


def train_flops(config: TrainConfig, extent: Extent | None) -> int:
    """Of one sample in the real train step; `extent` None = padded and with everything computed."""
    config, batch = _prepared(dataclasses.replace(config, batch_size=1), extent)
    state = jax.eval_shape(functools.partial(step_jax.init_state, config), jax.random.key(0))
    step = functools.partial(step_jax.train_step, config)
    return count(jax.make_jaxpr(step)(jax.random.key(0), state, batch))


def sample_flops(config: TrainConfig, extent: Extent | None) -> int:
    """Of one chunk in ten flow steps."""
    config, batch = _prepared(config, extent)
    params = jax.eval_shape(functools.partial(step_jax.init_state, config), jax.random.key(0)).params
    return count(jax.make_jaxpr(functools.partial(step_jax.sample_step, config))(jax.random.key(0), params, batch))


def _prepared(config: TrainConfig, extent: Extent | None) -> tuple[TrainConfig, dict[str, Any]]:
    batch = batch_spec(config)
    model = dataclasses.replace(config.model, skip_unused=extent is not None)
    config = dataclasses.replace(config, model=model)
    if extent is None:
        return config, batch
    # Abstract arrays cannot be sliced; zeros can, and one sample is small.
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), batch)
    part = compact.cut(zeros, extent)
    return config, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), part)


# --- the report -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe with the prompt length that its data needs.

    Attributes:
        cameras: in the data, under client keys; None = all of the robot's.
        prompt_len: tokens after rounding up; `why` says from what.
    """

    recipe: str
    prompt_len: int
    why: str
    cameras: tuple[str, ...] | None = None


_LIBERO = "instruction of at most 18 words and no state: about 22 tokens"
CASES = (
    Case("pi05_libero", 32, _LIBERO),
    Case("pi05_libero", 64, "the same, if every word took three tokens"),
    Case("pi0_libero", 32, _LIBERO),
    Case("pi0_libero_low_mem_finetune", 32, _LIBERO),
    Case("pi0_fast_libero", 128, "prompt and state about 70 tokens, ten actions about 30 to 50"),
    Case("pi05_droid_finetune", 96, "state of 8 numbers: 8 x 4 tokens, frame 12, instruction up to 20"),
    Case("pi0_aloha_sim", 32, "one fixed prompt of 3 words", cameras=("images/cam_high",)),
    Case("pi05_aloha_pen_uncap", 96, "state of 14 numbers: 14 x 4 tokens, frame 12, 3 words"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    report = "\n".join([*_HEAD, *map(_row, CASES), "", *_NOTES, ""])
    target = parser.parse_args().report
    if target is not None:
        target.write_text(report)
    print(report)


_HEAD = [
    "# Counted work with and without what changes no number",
    "",
    f"{datetime.date.today()}, JAX {jax.__version__}. Command: `JAX_PLATFORMS=cpu python benchmarks/flops.py --report "
    "benchmarks/flops.md`.",
    "TFLOP of one training sample (real train step: forward, rematerialised forward, backward) and of one action chunk "
    "(ten flow steps), counted by walking the traced program on abstract arrays of the published sizes. Padded: three "
    "cameras, `max_token_len` tokens, `skip_unused=False`, which is what the published trainer computes.",
    "",
    "| recipe | cameras used | prompt tokens | train padded | train | ratio | chunk padded | chunk | ratio |",
    "|---|---|---|---|---|---|---|---|---|",
]
_NOTES = [
    "Cameras used are those that the recipe's own robot transforms leave unmasked. Prompt tokens are an assumption "
    "about the data, rounded up to a multiple of 32 as training and serving do:",
    "",
    *(f"- `{case.recipe}`, {case.prompt_len}: {case.why}" for case in CASES),
    "",
    "PaliGemma's tokenizer was not at hand: common English words are one token each in its vocabulary of 257152, and "
    "it splits numbers into digits; the lengths follow from that. Training measures its own batches, so a longer "
    "prompt costs time and never changes a number. Of pi0-FAST a chunk takes as many steps as it has tokens, so it "
    "has no count here.",
]


def _row(case: Case) -> str:
    config = get_config(case.recipe)
    masks = camera_masks(config, case.cameras)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, image_keys=tuple(masks)))
    cameras = tuple(key for key, is_used in masks.items() if is_used)
    extent = Extent(cameras, case.prompt_len)
    is_fast = isinstance(config.model, Pi0FASTConfig)
    columns = [case.recipe, f"{len(cameras)} of {len(masks)}", f"{case.prompt_len} of "
               f"{config.model.max_token_len}"]  # fmt: skip
    for flops in (train_flops, sample_flops):
        if flops is sample_flops and is_fast:
            columns += ["-", "-", "-"]
            continue
        padded, used = flops(config, None), flops(config, extent)
        columns += [f"{padded / 1e12:.2f}", f"{used / 1e12:.2f}", f"{used / padded:.3f}"]
    return f"| {' | '.join(columns)} |"


if __name__ == "__main__":
    main()
