"""Latency of a whole policy call and of its parts: JAX, and PyTorch eager, compiled, as a CUDA graph, and both.

    python benchmarks/latency.py [--size full] [--report benchmarks/latency.md]

pi0.5 with random weights: three cameras, a prompt that fills all tokens, 50 actions, 10 steps, bfloat16. Sides run one
after another, each in a process of its own, so that none sees the other's memory. Results of finished sides are printed
and written (`--report`, and a `.json` beside it) as they come, so a run that is stopped has lost nothing. Without a GPU
the size is `small` unless told otherwise, and sides that need one are left out.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from latency_side import PARTS, SIDES, SIZES

HERE = Path(__file__).parent
TOKENIZER = HERE.parent / "tests/golden/tokenizers/tiny_paligemma_tokenizer.model"
ON_DEVICE = ("image encoder", "prefix", "denoising")
TARGETS_MS = (14.0, 9.2)  # on an H200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="default: full on a GPU, else small")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seconds", type=float, default=10, help="of repeating the whole call, for each side")
    parser.add_argument(
        "--limit", type=float, default=450, help="seconds for everything; sides after that are left out"
    )
    parser.add_argument("--compile-mode", help="of torch.compile; default: the model's on a GPU, else 'default'")
    parser.add_argument("--tokenizer", default=str(TOKENIZER), help="a sentencepiece model, to make prompts with")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    on_gpu = has_gpu()
    size = args.size or ("full" if on_gpu else "small")
    mode = args.compile_mode or (SIZES[size].pytorch_compile_mode if on_gpu else "default")
    options = [f"--size={size}", f"--compile-mode={mode}", f"--tokenizer={args.tokenizer}", f"--seconds={args.seconds}"]
    setting = {"size": size, "compile_mode": mode, "gpu": on_gpu, "load": os.getloadavg()[0]}
    results: dict[str, Any] = {"setting": setting | machine()}
    end = time.monotonic() + args.limit
    with tempfile.TemporaryDirectory() as cache:  # what is compiled for one side serves the other
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
        for side in args.sides:
            results[side] = run(side, options, environment, end - time.monotonic())
            print(f"== {side}: {summary(results[side])}", flush=True)
            if args.report:
                kept = {name: {k: v for k, v in value.items() if k != "actions"} for name, value in results.items()}
                args.report.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
                args.report.write_text(report(results))
    print(report(results))


def machine() -> dict[str, Any]:
    return {"date": str(datetime.date.today()), "cores": os.cpu_count(), "python": platform.python_version()}


def has_gpu() -> bool:
    """Asked in a process that ends, so that this one holds nothing of the device."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def run(side: str, options: list[str], environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """The side's result, or why there is none."""
    if seconds < 20:
        return {"skipped": "no time left"}
    start = time.monotonic()
    command = [sys.executable, str(HERE / "latency_side.py"), side, *options]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        trouble = None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the compiler's workers, too
        output, _ = process.communicate()
        trouble = f"not done after {seconds:.0f} s"
    lines = output.strip().splitlines() or [""]
    if trouble is None and process.returncode:
        trouble = f"failed: {lines[-1][:200]}"
    if trouble is not None:
        print(output[-6000:], flush=True)
    answer = next((line for line in reversed(lines) if line.startswith("{")), None)
    if answer is None:
        return {"skipped": trouble}
    return json.loads(answer) | {"side_s": time.monotonic() - start} | ({"trouble": trouble} if trouble else {})


def summary(result: dict[str, Any]) -> str:
    short = {
        key: result[key]
        for key in ("skipped", "trouble", "ready_s", "infer_ms", "parts_ms", "memory_gb")
        if key in result
    }
    return json.dumps(short or {key: value for key, value in result.items() if key != "actions"})


# --- the report ---------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    setting, limits = results["setting"], results.get("ceilings", {})
    sides = {name: value for name, value in results.items() if name in SIDES and name != "ceilings"}
    done = {name: value for name, value in sides.items() if "infer_ms" in value}
    device = limits.get("device", "unknown device")
    lines = [
        "# Latency of a policy call",
        "",
        f"{setting['date']}, {device}, {setting['cores']} cores, Python {setting['python']}, PyTorch "
        f"{limits.get('torch', '?')}. Command: `python benchmarks/latency.py --size {setting['size']}`. Size "
        f"`{setting['size']}`: {described(setting['size'])}, random weights. `torch.compile` mode "
        f"`{setting['compile_mode']}`. Load average before it: {setting['load']:.1f}. Times in ms.",
        "",
    ]
    if not setting["gpu"]:
        lines += [
            "**Without a GPU.** The numbers below show that the program runs, and nothing else: a small model on a "
            "processor that others used, too, and more of it during one side than during another. Sides cannot be "
            "compared, and a part, being a difference, can come out negative. Open: every number on a GPU. Targets for "
            f"the full size on an H200, reached by nobody yet: under {TARGETS_MS[0]:g} ms, then {TARGETS_MS[1]:g} ms.",
            "",
        ]
    lines += whole_table(done, limits)
    lines += [f"- {name}: left out, {value['skipped']}." for name, value in sides.items() if "skipped" in value]
    lines += [f"- {name}: measured, then {value['trouble']}." for name, value in done.items() if "trouble" in value]
    lines += ["", "## Parts (median)", "", *parts_table(done), "", *work_table(done, limits)]
    for name, value in done.items():
        if value.get("kernels"):
            lines += ["", f"## Kernels of {name}, per call", "", "| kernel | launches | ms |", "|---|---|---|"]
            for kernel in value["kernels"]:
                symbol = kernel["name"].replace("|", "/")
                lines.append(f"| `{symbol}` | {kernel['launches']:.0f} | {kernel['ms']:.3f} |")
    return "\n".join(lines) + "\n"


def described(size: str) -> str:
    config = SIZES[size]
    prefix, suffix = config.experts
    patches = (config.image_resolution[0] // config.image_encoder.patch_size) ** 2
    return (
        f"pi0.5, {prefix.depth} layers of width {prefix.width} and {suffix.width}, {len(config.image_keys)} cameras, "
        f"{len(config.image_keys) * patches + config.max_token_len} prefix tokens, {config.action_horizon} actions, "
        f"10 steps, {config.dtype}"
    )


def whole_table(done: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    """`Policy.infer`, with what it achieves of the device."""
    lines = ["| | p50 | p99 | calls | TFLOP/s | of GEMM ceiling | of copy ceiling | ready after, s | memory, GB | "
             "differs from eager |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    eager = done.get("PyTorch, eager", {}).get("actions")
    for name, value in done.items():
        times, memory = value["infer_ms"], value.get("memory_gb")
        shares = ["-", "-", "-"]
        if "work" in limits:
            tflop, gb = (sum(part[unit] for part in limits["work"].values()) for unit in ("tflop", "gb"))
            rate, moved = tflop / times["p50"] * 1e3, gb / times["p50"]
            shares = [f"{rate:.3g}", f"{rate / limits['gemm_tflops']:.1%}", f"{moved / limits['copy_tbps']:.1%}"]
        row = [name, f"{times['p50']:.2f}", f"{times['p99']:.2f}", str(times["calls"]), *shares]
        row += [f"{value['ready_s']:.0f}", f"{memory:.1f}" if memory else "-"]
        is_comparable = eager is not None and name.startswith("PyTorch,") and name != "PyTorch, eager"
        row.append(difference(value["actions"], eager) if is_comparable else "-")
        lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        "Differs: largest difference of the actions from those of eager PyTorch, with the same weights and noise, "
        "relative to the largest action. JAX has random weights of its own.",
        "",
    ]
    return lines


def difference(actions: Any, eager: Any) -> str:
    return f"{np.abs(np.subtract(actions, eager)).max() / np.abs(eager).max():.1e}"


def parts_table(done: dict[str, Any]) -> list[str]:
    lines = [f"| part | {' | '.join(done)} |", f"|---|{'---|' * len(done)}"]
    for part in PARTS:
        row = (f"{value['parts_ms'][part]:.3f}" for value in done.values())
        lines.append(f"| {part} | {' | '.join(row)} |")
    sums = (f"{sum(value['parts_ms'].values()):.3f}" for value in done.values())
    lines.append(f"| sum | {' | '.join(sums)} |")
    return [
        *lines,
        "",
        "Parts on the device are differences of programs that all begin at the images.",
    ]


def work_table(done: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    """What has to be computed and read, at the device's measured rates, against the fastest side."""
    if "work" not in limits:
        return []
    gemm, copy = limits["gemm_tflops"], limits["copy_tbps"]
    floors = {part: max(w["tflop"] / gemm * 1e3, w["gb"] / copy) for part, w in limits["work"].items()}
    fastest = min(done, key=lambda name: done[name]["infer_ms"]["p50"], default=None)
    lines = [
        "## Work",
        "",
        f"Measured ceilings: {gemm:.3g} TFLOP/s (product of random bfloat16 matrices), {copy:.3g} TB/s (copy on the "
        "device, bytes read and written). Work: FLOPs of products, counted on the program; bytes of weights and of the "
        "cache that each part reads. Floor: the larger of the two times at the ceilings.",
        "",
        f"| part | TFLOP | GB | floor | {fastest} | of GEMM ceiling | of copy ceiling |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in ON_DEVICE:
        w, found = limits["work"][part], done[fastest]["parts_ms"][part] if fastest else float("nan")
        lines.append(
            f"| {part} | {w['tflop']:.4g} | {w['gb']:.4g} | {floors[part]:.2f} | {found:.2f} | "
            f"{w['tflop'] / found * 1e3 / gemm:.1%} | {w['gb'] / found / copy:.1%} |"
        )
    lines.append(f"| all | | | {sum(floors.values()):.2f} | | | |")
    return lines


if __name__ == "__main__":
    main()
