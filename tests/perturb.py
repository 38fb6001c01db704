"""Another machine, imitated: each product of matrices and each exponential is a little different.

    with perturbed(seed=1):
        ...                       # what holds here does not depend on a BLAS or an instruction set

    python -m pytest --other-machine tests/test_grpo.py       # a file's tests, each under it

Processors differ in the order of their sums and in the last bit of `exp`. Each number in the result
of such an operation is multiplied with 1 + noise, the noise uniform within 1e-15 in float64 and
within 1e-7 in fp32, about what sums of some hundred terms differ by. The noise depends on the
operation and on the shape of its result: a machine gives the same result twice.
"""

import zlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SIZE = {torch.float64: 1e-15, torch.float32: 1e-7}
OPERATIONS = {
    *("mm", "addmm", "bmm", "baddbmm", "exp", "log", "cos", "sin", "_softmax", "_log_softmax"),
    *("logsumexp", "silu", "rsqrt", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_flash_attention_for_cpu_backward",),
}


class perturbed(TorchDispatchMode):
    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in OPERATIONS:
            self.count[name] = self.count.get(name, 0) + 1
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if getattr(tensor, "dtype", None) in SIZE and tensor.device.type == "cpu":
                    tensor.mul_(1 + SIZE[tensor.dtype] * self.noise(name, tensor))
        return result

    def noise(self, name: str, like: torch.Tensor) -> torch.Tensor:
        seed = zlib.crc32(f"{self.seed} {name} {tuple(like.shape)}".encode())
        generator = torch.Generator().manual_seed(seed)
        return 2 * torch.rand(like.shape, generator=generator, dtype=like.dtype) - 1
