"""Compiles the kernel for GPUs that need not be there; prints what the code has, as JSON."""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ekfac_dist.curvature import triton_squares as kernel

POINTERS = {"lambdas": "*fp32", "acts": "*fp32", "grads": "*fp32", "bounds": "*i64"}
TILES = {"TILE_O": kernel.TILE_O, "TILE_I": kernel.TILE_I, "STEP": kernel.STEP}
UNITS = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma"

compiled = []
for capability in (80, 90, 100):
    for precision in kernel.PRECISIONS:
        constants = TILES | {"PRECISION": precision}
        names = [parameter.name for parameter in kernel._add_squares.params]
        types = dict.fromkeys(names, "i32") | POINTERS | {"one": "fp32"}
        source = ASTSource(
            kernel._add_squares,
            types | dict.fromkeys(constants, "constexpr"),
            constants,
            # What tensors of common sizes have: addresses and strides that 16 divides.
            {
                (number,): [["tt.divisibility", 16]]
                for number, name in enumerate(names)
                if name in POINTERS or name.startswith("num_out") or name.endswith("stride")
            },
        )
        target = GPUTarget("cuda", capability, 32)
        code = triton.compile(source, target, {"num_warps": kernel._WARPS})
        ptx = code.asm["ptx"]
        compiled.append(
            {
                "capability": capability,
                "precision": precision,
                "bytes": len(code.asm["cubin"]),
                "units": len(re.findall(UNITS, ptx)),
                "multiply_adds": len(re.findall(r"fma\.rn\.f32\s", ptx)),
                "pairs": len(re.findall(r"fma\.rn\.f32x2\s", ptx)),
            }
        )
print(json.dumps(compiled))
