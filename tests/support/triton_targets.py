"""Compiles the kernels written here for cards that are not there, and prints what each takes of one; a test reads it.

Triton's compiler and the assembler in its package need no GPU. They need a process in which Triton does not interpret.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from openpi.models_pytorch import attention_kernels, fused_kernels

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
ALIGNED = [["tt.divisibility", 16]]
PREFIX, ACTIONS = 968, 50  # tokens of pi0.5 with three cameras


def launches(shared_bytes: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Of pi0.5 as it is published, on a card whose blocks have so much shared memory."""
    found = []

    def record(kernel: Any, _grid: Any, *args: Any, **options: Any) -> None:
        found.append((kernel, args, options))

    def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    with mock.patch.object(attention_kernels, "launch", record), mock.patch.object(fused_kernels, "launch", record):
        for queries, keys in ((ACTIONS, PREFIX + ACTIONS + 6), (PREFIX, PREFIX)):
            q, k, bias = tokens(1, queries, 8, 256), tokens(1, keys, 1, 256), tokens(1, 1, queries, keys)
            for tiling in attention_kernels.tilings(queries * 8, shared_bytes):
                attention_kernels.attend(q, k, k, bias, tiling)
        table = tokens(1, 1, 1024)
        fused_kernels.norm(tokens(1, ACTIONS, 1024), table, table, 1e-6, (tokens(1, ACTIONS, 1024), table))
        fused_kernels.norm(tokens(1, PREFIX, 2048), tokens(2048, dtype=torch.float32), None, 1e-6, None)
        fused_kernels.geglu(tokens(1, ACTIONS, 8192))
        angles = tokens(1, ACTIONS, 1, 128, dtype=torch.float32)
        fused_kernels.rope(tokens(1, ACTIONS, 10, 256)[:, :, :9], angles, angles)
    return found


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], capability: int) -> Any:
    """As a launch with these arguments would: 1 is a constant, and numbers that 16 divides are known to be so."""
    constants = {name: value for name, value in options.items() if name.isupper()}
    signature: dict[str, str] = {}
    aligned = {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            constants[name] = value
        else:
            signature[name] = "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[i,] = ALIGNED
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, ordered, constexprs=constants, attrs=aligned)
    given = {name: value for name, value in options.items() if name not in constants}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=given)


def stack_bytes(cubin: bytes) -> int:
    """Of a thread: what did not fit into registers."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"STACK:(\d+)", told))


def main() -> None:
    for capability, shared_bytes in json.loads(sys.argv[1]):
        for kernel, args, options in launches(shared_bytes):
            found = compiled(kernel, args, options, capability)
            took = {"shared": found.metadata.shared, "stack": stack_bytes(found.asm["cubin"])}
            told = {"kernel": kernel.__name__, "options": options, "capability": capability, **took}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
