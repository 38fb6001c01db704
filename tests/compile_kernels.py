"""Compile every kernel for GPUs that need not be present, and print the resources each takes.

Run in a process without TRITON_INTERPRET: python -m tests.compile_kernels
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import advantage, decode, fused, logprob

TARGETS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}  # shared memory of a block
V = 152_064
ROWS = {"logits": "*fp32", "targets": "*i64", "entropies": "*fp32", "peaks": "*fp32"}
ROWS |= {"log_sums": "*fp32", "scale": "fp32"}
BACKWARD = {**ROWS, "a_rows": "*fp32", "b_rows": "*fp32"}
GROUPS = ("rewards", "advantages")
GROUP_SIZE = {"N": 16, "BLOCK": 16, "BY_STD": True, "EPSILON": 1e-6}
CACHE = dict.fromkeys(("q", "k", "v", "keys", "values", "y"), "*bf16") | {"lengths": "*i64"}
CACHE |= dict.fromkeys(("maxima", "sums", "partials"), "*fp32") | {"scale": "fp32"}
SIZES = ("width", "span", "splits", "q_stride", "k_stride", "v_stride", "K", "L", "H")
CACHE |= dict.fromkeys(SIZES, "i32")
HEADS = {"ROWS": 16, "BLOCK": decode.BLOCK, "ONE_SPLIT": False}
KERNELS = [  # kernel, types of its arguments, constants, options
    (logprob.row_kernel, {**ROWS, "logprobs": "*fp32"}, {"V": V, "BLOCK": 8192}, {"num_warps": 8}),
    (decode.combine_kernel, CACHE, {"E": 128, "E_PAD": 128, "SPLITS_PAD": 32}, {}),
]
for dtype in ("*bf16", "*fp32"):
    for has_b in (False, True):
        block = {"V": V, "BLOCK": 4096, "HAS_B": has_b}
        KERNELS.append((logprob.gradient_kernel, {**BACKWARD, "gradient": dtype}, block, {}))
for dtype in ("*fp32", "*fp64"):
    KERNELS.append((advantage.group_kernel, dict.fromkeys(GROUPS, dtype), GROUP_SIZE, {}))
for E, group in ((64, 7), (128, 7), (128, 2), (64, 4)):  # Qwen2.5's heads at 0.5B and 7B, Qwen3's,
    heads = HEADS | {"G": group, "E": E, "E_PAD": E}  # and Llama 3's
    KERNELS.append((decode.split_kernel, CACHE, heads, {"num_warps": 4, "num_stages": 3}))
FUSED = dict.fromkeys(("x", "added", "weight", "normed", "qkv", "q_weight", "k_weight"), "*bf16")
FUSED |= dict.fromkeys(("cos", "sin", "gate_up", "product"), "*bf16") | {"eps": "fp32"}
FUSED |= {"H": "i32", "HEADS": "i32", "logits": "*fp32", "maxima": "*fp32", "sums": "*fp32"}
FUSED |= {"scale": "fp32", "blocks": "i32"}
for D, block, warps in ((896, 1024, 2), (3584, 4096, 8)):
    sizes = {"D": D, "BLOCK": block}
    KERNELS.append((fused.add_norm_kernel, FUSED, sizes, {"num_warps": warps}))
for E, has_norm in ((64, False), (128, True)):
    sizes = {"E": E, "BLOCK": E // 2, "HAS_NORM": has_norm}
    KERNELS.append((fused.norm_rope_kernel, FUSED, sizes, {"num_warps": 1}))
KERNELS.append((fused.silu_mul_kernel, FUSED, {"INNER": 18_944, "BLOCK": 1024}, {}))
for size, padded in ((128, 128), (501, 512)):  # Qwen2.5's vocabulary and Llama 3's
    sizes = {"SIZE": size, "PADDED": padded, "GROUP": 4096 // padded}
    KERNELS.append((fused.block_sums_kernel, FUSED, sizes, {}))


def compile_for(target: str, kernel, types: dict, constants: dict, options: dict) -> str:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=gpu, options=options or None)
    shared = compiled.metadata.shared
    assert shared <= TARGETS[target], f"{kernel.__name__}: too much shared memory for {target}"
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    tool = next(p for p in sorted(folder.glob("ptxas*"), reverse=target == "sm_80"))
    if target == "sm_100":
        tool = next(iter(sorted(folder.glob("ptxas-blackwell"))), tool)
    arch = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        command = [str(tool), "-v", f"--gpu-name={arch}", str(path), "-o", str(path) + ".cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report).group(1))
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    assert spills == 0, f"{kernel.__name__} spills on {target}"
    return f"{registers} registers, {spills} bytes spilled, {shared} bytes shared"


if __name__ == "__main__":
    for kernel, types, constants, options in KERNELS:
        for target in TARGETS:
            line = compile_for(target, kernel, types, constants, options)
            kind = " ".join(f"{k}={v}" for k, v in constants.items())
            dtype = types.get("gradient") or types.get("rewards", "")
            print(f"{kernel.__name__} {kind} {dtype} {target}: {line}")
