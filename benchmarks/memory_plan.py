"""The memory plan against XLA's own analysis of the compiled train step.

    JAX_PLATFORMS=cpu python benchmarks/memory_plan.py [--full-size] [--report benchmarks/memory_plan.md]

XLA compiles the same step for the CPU and says what arguments and temporary buffers it allocates; nothing is run.
"""

import argparse
import dataclasses
import datetime
import functools
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from openpi.models.gemma_config import GemmaConfig, LoRAConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.training import plan, step_jax
from openpi.training.config import TrainConfig, get_config

MIB = 2**20


def xla_bytes(config: TrainConfig) -> int:
    """Arguments and temporary buffers of the step, compiled for this machine; results lie in donated arguments."""
    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(functools.partial(step_jax.init_state, config), key)
    observation, actions = config.model.inputs_spec(batch_size=config.batch_size)
    batch = {**observation.to_dict(), "actions": actions}
    step = jax.jit(functools.partial(step_jax.train_step, config), donate_argnums=1)
    found = step.lower(key, state, batch).compile().memory_analysis()
    unaliased = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + unaliased


def middle_sized(*, lora: bool = False, **fields) -> Pi0Config:
    """The published shape of model at an eighth of the width: 11 M parameters, all tokens, f32."""
    adapters = LoRAConfig(rank=8, alpha=8.0) if lora else None
    expert = GemmaConfig(256, 6, 1024, 8, 1, 32, vocab_size=4096, attn_lora=adapters, ffn_lora=adapters)
    return Pi0Config(
        dtype="float32",
        paligemma_variant=expert,
        action_expert_variant=dataclasses.replace(expert, width=128, mlp_dim=512),
        image_encoder_variant=SiglipConfig(192, 6, 512, 4, 14),
        **fields,
    )


def cases(*, full_size: bool) -> Iterator[tuple[str, TrainConfig]]:
    base = dataclasses.replace(get_config("debug"), batch_size=8)

    def case(model: Pi0Config, **fields) -> TrainConfig:
        return dataclasses.replace(base, model=model, **fields)

    lora = middle_sized(lora=True)
    yield "pi0, full", case(middle_sized())
    yield "pi0.5, full", case(middle_sized(pi05=True))
    yield "pi0.5, dots", case(middle_sized(pi05=True, remat="dots"))
    yield "pi0, none, batch 4", case(middle_sized(remat="none"), batch_size=4)
    yield "pi0, full, 2 parts", case(middle_sized(), gradient_accumulation_steps=2)
    yield "pi0 LoRA, full, no EMA", case(lora, freeze_filter=lora.get_freeze_filter(), ema_decay=None)
    if full_size:
        for name in ("pi0_libero", "pi0_libero_low_mem_finetune"):
            config = get_config(name)
            model = dataclasses.replace(config.model, dtype="float32")
            yield f"{name}, float32, batch 8", dataclasses.replace(config, model=model, batch_size=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="also compile published sizes, minutes")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    lines = [
        "# Predicted memory of a train step against XLA's analysis",
        "",
        f"{datetime.date.today()}, {platform.machine()}, JAX {jax.__version__}, compiled for the CPU. Command: "
        "`JAX_PLATFORMS=cpu python benchmarks/memory_plan.py --full-size --report benchmarks/memory_plan.md`.",
        "",
        "| step | state MiB | predicted peak MiB | XLA MiB | predicted / XLA | predicted in s | compiled in s |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name, config in cases(full_size=args.full_size):
        start = time.perf_counter()
        memory = plan.predict(config)
        middle = time.perf_counter()
        xla = xla_bytes(config)
        state = memory.parameters + memory.optimizer + memory.average
        lines.append(
            f"| {name} | {state / MIB:.0f} | {memory.total / MIB:.0f} | {xla / MIB:.0f} | {memory.total / xla:.2f} | "
            f"{middle - start:.1f} | {time.perf_counter() - middle:.0f} |"
        )
        print(lines[-1], flush=True)
    lines += ["", *_NOTES, ""]
    if args.report is not None:
        args.report.write_text("\n".join(lines))


_NOTES = [
    "`full`, `dots`, `none`: `model.remat`. The middle-sized models have the published number of tokens and cameras, "
    "and an eighth of the width; activations outweigh the state there, so the ratio judges how they are estimated.",
    "",
    "XLA for the CPU is not XLA for a GPU: it fuses less, keeps transposed copies of attention operands, and computes "
    "bfloat16 products in float32, which is why the models here are float32. Parameters, optimiser state and averages "
    "are counted, not estimated. No GPU was at hand to measure a peak on one; expect less there, since attention is "
    "fused and needs fewer copies: the published trainer is said to run `pi0_libero_low_mem_finetune` in 22.5 GB, for "
    'which `openpi train --plan` predicts more. So "fits" errs on the safe side.',
    "",
    "The full-size LoRA row is an artefact of that: the compiler keeps float32 copies of all frozen bfloat16 weights "
    "outside the loop over layers (4.5 + 2.3 + 0.6 GiB for the MLPs alone, seen in its list of buffers), which "
    "bfloat16 computation on a GPU has no use for. Without them the ratio would be about 0.7.",
]


if __name__ == "__main__":
    main()
