"""Compiles a share of the Triton variants ahead of time: FOLDER SHARE/SHARES ARCH,... MODULE...

A process of its own for :mod:`benchmarks.codecheck.kernels`; imports nothing of it. Prints a line of JSON a kernel.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def main(folder: str, share: str, archs: str, *modules: str) -> None:
    mine, shares = map(int, share.split("/"))
    jobs = [
        (module, variant, arch)
        for module in modules
        for variant in import_module(f"ltkernels.triton.{module}").variants()
        for arch in archs.split(",")
    ]
    for order in range(mine, len(jobs), shares):
        module, variant, arch = jobs[order]
        source = ASTSource(variant.kernel, variant.signature, variant.constexprs, variant.attrs)
        target = GPUTarget("cuda", int(arch.rstrip("a")), 32)
        compiled = triton.compile(source, target=target, options={"num_warps": variant.num_warps})
        cubin = Path(folder) / f"{module}-{order}-sm_{arch}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        made = {
            "order": order,
            "cubin": str(cubin),
            "entry": compiled.metadata.name,
            "source": module,
            "name": variant.name,
            "arch": f"sm_{arch}",
            "shared": compiled.metadata.shared,
            "threads": 32 * variant.num_warps,
            "bytes_per_logit": variant.bytes_per_logit,
            "logits": variant.logits,
            "least_wide_loads": variant.wide_loads,
            "least_wide_stores": variant.wide_stores,
        }
        print(json.dumps(made), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
