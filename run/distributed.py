"""Many processes that work as one, under torchrun; without it, one rank.

    device, ranks = init_distributed()
    model = load(folder, shard=ranks.shard)               # FSDP2: each rank has its shard
    results = ranks.map_over_ranks("sample", prompts, work)   # works on its part, gets all results
    everything = ranks.gather(mine)                       # one object of each rank
    sync_weights(copy.parameters(), model.parameters())   # shards -> a whole copy, in its type

Samples and scores are exchanged in full: every rank computes the same advantages and the same
normaliser, packs the same micro-batches, and trains its share. FSDP sums gradients, no average.

An error inside `map_over_ranks` is raised on all ranks; a signal to stop is acted on there, too. An
error elsewhere ends its process, and torchrun ends the others. A watchdog names a rank that hangs.
"""

import atexit
import datetime
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# Errors that explain themselves. The first match is used: subclasses come before RuntimeError.
ERRORS = (FloatingPointError, ValueError, OSError, torch.OutOfMemoryError, RuntimeError)


class Stopping(BaseException):
    """SIGTERM or Ctrl-C reached some rank: all abandon the current step.

    No Exception, as it may be raised inside a library's call that catches those."""


class Failure(NamedTuple):
    """An error of another rank."""

    kind: type
    message: str


class Ranks:
    """One of `size` processes; by default the only one."""

    def __init__(self, rank: int = 0, size: int = 1, mesh=None, group=None, store=None):
        self.rank, self.size, self.mesh, self.group, self.store = rank, size, mesh, group, store
        self.step, self.stage, self.stage_began = 0, "", time.monotonic()
        self.stop = False  # set by a signal's handler; `map_over_ranks` acts on it
        self.stoppable = False  # while the handler may raise Stopping itself: see `attempt`
        self.ending = False  # while the last things are saved: no signal interrupts that
        self.over = threading.Event()  # ends the watchdog

    # ------------------------------------------------------------------------------ exchange

    def map_over_ranks(self, what: str, items: Sequence, work: Callable[[Sequence], list]) -> list:
        """Item i goes to rank i % size; `work` gives a result for each; all ranks get them all.

        Results are plain data, tensors on the CPU. One rank's error or signal is raised in all.
        """
        self.set_stage(what)
        if self.size == 1:
            return self.attempt(work, items)
        mine = items[self.rank :: self.size]
        try:
            outcome = self.attempt(work, mine) if len(mine) else []
        except Stopping:
            outcome = Failure(Stopping, "")
        except Exception as error:
            kind = next((k for k in ERRORS if isinstance(error, k)), None)
            message = str(error) if kind else traceback.format_exc()
            outcome = Failure(kind or RuntimeError, message)
        self.set_stage(f"{what}, done")
        outcomes = self.gather(outcome)
        failed = [(r, x) for r, x in enumerate(outcomes) if isinstance(x, Failure)]
        if failed:  # of an error and a stop, the error
            rank, failure = min(failed, key=lambda pair: pair[1].kind is Stopping)
            raise failure.kind(f"rank {rank}: {failure.message}")
        results = [None] * len(items)
        for rank, part in enumerate(outcomes):
            results[rank :: self.size] = part
        return results

    def attempt(self, work: Callable, items):
        """A signal may raise Stopping anywhere in `work`, which must be safe to repeat."""
        self.stoppable = not self.ending
        try:
            if self.stop and not self.ending:
                raise Stopping
            return work(items)
        finally:
            self.stoppable = False

    def gather(self, mine) -> list:
        """[rank 0's object, rank 1's, …] on every rank."""
        if self.size == 1:
            return [mine]
        everything = [None] * self.size
        dist.all_gather_object(everything, mine, group=self.group)
        return everything

    def rank0_then_all(self, what: str, work: Callable[[], object]):
        """`work` on rank 0, then on all, which read what it left on the disk."""
        if self.size == 1:
            return work()
        self.on_rank0(what, lambda: bool(work()))
        return self.map_over_ranks(what, range(self.size), lambda _: [work()])[self.rank]

    def on_rank0(self, what: str, work: Callable[[], object]):
        """`work` on rank 0 alone; its result, or its error, on all."""
        return self.map_over_ranks(what, [None], lambda _: [work()])[0]

    # ----------------------------------------------------------------------------- the weights

    def shard(self, model: nn.Module) -> Callable[[str, Tensor], Tensor]:
        """Shard a model on the meta device, block by block. Returns `place(name, whole tensor)`.

        What lies outside the blocks (embedding, last norm, head) is one group: tied weights are one
        parameter, and the head stays whole from the forward to the loss and back.
        """
        if self.size == 1:
            return lambda name, whole: whole
        half = {}
        if self.mesh.device_type == "cuda":  # bf16 travels and computes, fp32 stays and is summed
            half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        policy = MixedPrecisionPolicy(**half, cast_forward_inputs=False)
        for module in (*model.blocks, model):
            fully_shard(module, mesh=self.mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
        shares = dict(model.named_parameters())

        def place(name: str, whole: Tensor) -> Tensor:
            share = shares[name]  # every rank has read the file: nothing is sent
            return distribute_tensor(whole, share.device_mesh, share.placements, src_data_rank=None)

        return place

    # ------------------------------------------------------------------------------ the clock

    def set_stage(self, what: str) -> None:
        """For the watchdog and the progress line."""
        self.stage, self.stage_began = what, time.monotonic()
        if self.store is not None:
            self.store.set(f"at {self.rank}", f"step {self.step}, {what}")

    def watch(self, hang_timeout: float) -> None:
        """A thread of each rank: without a new stage for `hang_timeout` seconds it ends the
        process, and shows the stages of all ranks. The one that hangs is at another stage than
        most. Rank 0 is first to do so."""
        store = self.store.clone()  # its own connection: a call that waits would stall the loop
        while not self.over.wait(min(10.0, hang_timeout / 5)):
            if time.monotonic() - self.stage_began < hang_timeout + 60 * (self.rank > 0):
                continue
            try:
                stages = store.multi_get([f"at {r}" for r in range(self.size)])
            except dist.DistError:
                abort("ssr.py: torchrun does not answer: it, or the machine of rank 0, is gone")
            stages = [x.decode() for x in stages]
            lines = [
                f"ssr.py: no progress for {hang_timeout:.0f} s (--hang-timeout). The ranks are at:"
            ]
            for stage in sorted(set(stages), key=stages.count):
                where = [rank for rank, at in enumerate(stages) if at == stage]
                lines.append(f"  {stage}: rank {', '.join(map(str, where))}")
            abort("\n".join(lines))


def init_distributed(hang_timeout: float = 1800.0) -> tuple[torch.device, Ranks]:
    """This process's device, and the ranks that torchrun started, or one alone. Collective."""
    local, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    # cuDNN plans its attention anew for each shape, and packed batches bring new ones each step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return device, Ranks()
    rank = int(os.environ["RANK"])
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if cuda:
        if local >= (count := torch.cuda.device_count()):
            raise ValueError(f"{per_node} processes on a machine with {count} GPUs: torchrun "
                             f"--nproc_per_node={count}")  # fmt: skip
        torch.cuda.set_device(device)
    # The watchdog reports first: it knows more than a collective that timed out.
    limit = datetime.timedelta(seconds=2 * hang_timeout + 60)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=limit,
        is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        wait_for_workers=False,
    )  # fmt: skip
    # torchrun may keep its store when it restarts ranks, with the addresses of the dead in it. So
    # keys begin with the number of starts: the largest, as a node's new torchrun counts from 0.
    starts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    store.set(f"starts {rank}", str(starts))
    all_starts = [int(store.get(f"starts {r}")) for r in range(size)]
    store = dist.PrefixStore(f"start {max(all_starts)}", store)
    both = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(both, store=store, rank=rank, world_size=size, timeout=limit)
    group = dist.new_group(backend="gloo", timeout=limit)  # for objects, even beside NCCL
    ranks = Ranks(rank, size, None, group, store)
    ranks.mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    ranks.set_stage("start")
    ranks.gather(None)  # all keys are there before a watchdog looks
    watchdog = threading.Thread(target=ranks.watch, args=(hang_timeout,), daemon=True)
    watchdog.start()

    def leave() -> None:
        """Threads that are in C++ when the interpreter ends would abort the process."""
        ranks.over.set()
        watchdog.join(timeout=10)  # its store may be gone
        if dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(leave)
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (rank 0 prints for all)
    return device, ranks


def abort(message: str):
    """Exit with an error. The first rank of a node prints it at once, whereupon torchrun ends the
    others; one that is still there prints it as well."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(message)
    try:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(2)
        who = f"rank {os.environ['RANK']} on {socket.gethostname()}"
        print(f"{message}  [{who}]", file=sys.stderr, flush=True)
    finally:  # also of torchrun's SIGTERM
        os._exit(1)  # threads that talk to ranks which are gone would never end


def is_lost(error: Exception) -> bool:
    """Whether it only means that another rank has gone."""
    lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
    return lost and dist.is_initialized()


def run_with_error_reporting(
    program: str, work: Callable[[], None], hint: str = "go on with --resume"
) -> None:
    """An error is printed in one line, by one rank. `hint`: how to continue after a lost rank."""
    try:
        work()
    except KeyboardInterrupt:
        abort(f"\n{program}: stopped")
    except torch.OutOfMemoryError as error:
        abort(f"{program}: {error}; lower --max-num-seqs or --micro-batch-tokens (see --dry-run)")
    except FloatingPointError as error:
        abort(f"{program}: {error}: the weights have diverged; lower --lr, or go on from best/")
    except (OSError, ValueError, RuntimeError) as error:
        if is_lost(error):
            abort(f"{program}: another rank has gone, killed or crashed. torchrun starts all of "
                  f"them again if --max-restarts allows it; else {hint}")  # fmt: skip
        abort(f"{program}: {error}")
    except Exception:  # a bug: its rank must not wait for its threads while the others wait for it
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        abort(traceback.format_exc())
    finally:
        if sys.exc_info()[0] is None and dist.is_initialized():
            dist.destroy_process_group()


def interrupt(*_):
    """SIGTERM like Ctrl-C; raised here, as a shell's background jobs ignore SIGINT."""
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------- weights, gradients


@torch.no_grad()
def sync_weights(copies: Iterable[Tensor], weights: Iterable[Tensor], decay: float = 0.0) -> None:
    """copy = decay * copy + (1 - decay) * weight, in place: captured graphs read these addresses.

    Weights that are spread over ranks are cast to the copies' type, then gathered: collective.
    """
    for mine, theirs in zip(copies, weights, strict=True):
        theirs = theirs.to(mine.dtype)
        if isinstance(theirs, DTensor) and not isinstance(mine, DTensor):
            theirs = theirs.full_tensor()
        if decay == 0:
            mine.copy_(theirs)
        else:
            mine.lerp_(theirs, 1 - decay)


def clip_gradients(parameters: list[Tensor], most: float) -> float:
    """Scale gradients down to the norm `most`; their norm before, the same on every rank."""
    norm = nn.utils.clip_grad_norm_(parameters, most)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
