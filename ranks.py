"""Many processes that work as one: who does what, what they tell each other, who waits for whom.

    ranks = join("cuda", patience=1800)              # under torchrun; without it: one rank
    model = load(folder, shard=ranks.shard)          # FSDP2: each rank has its share of the weights
    results = ranks.share("sample", prompts, work)   # work on my share; all results, on every rank
    everything = ranks.gather(mine)                  # one object of each rank
    follow(copy.parameters(), model.parameters())    # shares -> a whole copy, in its type

The division of labour: texts are dealt out by index and random numbers are keyed, so any number of
ranks uses the same ones for the same sample. Samples and scores are exchanged in full, they are
small beside the work of making them. So every rank knows the whole batch, computes the same
advantages and the same denominator, and packs the same micro-batches, of which it takes its share.
FSDP sums gradients without averaging: the loss is already divided by the whole batch's denominator.

An error inside `share` is raised on all ranks, so nobody waits for the dead; elsewhere it ends its
process, and torchrun ends the others. A signal to stop is acted on in the next `share`, too. What
cannot report itself any more (a process that hangs, a machine that is gone) is named by a thread
that looks at the clock.
"""

import atexit
import datetime
import os
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# Errors that explain themselves. The first match is used: subclasses come before RuntimeError.
KINDS = (FloatingPointError, ValueError, OSError, torch.OutOfMemoryError, RuntimeError)


class Stopping(BaseException):
    """SIGTERM or Ctrl-C reached some rank: all abandon the step in hand.

    Like KeyboardInterrupt it is no error: it may be raised inside any library's call, whose
    `except Exception` must not take it for one of its own."""


class Failure(NamedTuple):
    """How an error travels."""

    kind: type
    words: str


class Ranks:
    """One of `size` processes; by default the only one."""

    def __init__(self, rank: int = 0, size: int = 1, mesh=None, group=None, store=None):
        self.rank, self.size, self.mesh, self.group, self.store = rank, size, mesh, group, store
        self.step, self.stage = 0, ""
        self.stop = False  # set by a signal's handler; `share` acts on it
        self.stoppable = False  # true while the handler may raise Stopping itself: see `attempt`
        self.ending = False  # the last things are being kept: no signal interrupts that
        self.over = threading.Event()  # nobody needs to be watched any more

    # ------------------------------------------------------------------------------ exchange

    def share(self, what: str, items: Sequence, work: Callable[[Sequence], list]) -> list:
        """Item i goes to rank i % size; `work` gives a result for each; all ranks get them all.

        Results must be plain data, tensors on the CPU. An error or a signal in one rank's work is
        raised in all.
        """
        self.at(what)
        if self.size == 1:
            return self.attempt(work, items)
        mine = items[self.rank :: self.size]
        try:
            outcome = self.attempt(work, mine) if len(mine) else []
        except Stopping:
            outcome = Failure(Stopping, "")
        except Exception as error:
            kind = next((k for k in KINDS if isinstance(error, k)), None)
            words = str(error) if kind else traceback.format_exc()
            outcome = Failure(kind or RuntimeError, words)
        self.at(f"{what}, done")
        outcomes = self.gather(outcome)
        failed = [(r, x) for r, x in enumerate(outcomes) if isinstance(x, Failure)]
        if failed:  # of an error and a stop, the error
            rank, failure = min(failed, key=lambda pair: pair[1].kind is Stopping)
            raise failure.kind(f"rank {rank}: {failure.words}")
        results = [None] * len(items)
        for rank, part in enumerate(outcomes):
            results[rank :: self.size] = part
        return results

    def attempt(self, work: Callable, items):
        """While this runs a signal may raise Stopping at any point, so `work` must be such that it
        can be abandoned and done again."""
        self.stoppable = not self.ending
        try:
            if self.stop and not self.ending:
                raise Stopping
            return work(items)
        finally:
            self.stoppable = False

    def gather(self, mine) -> list:
        """[rank 0's object, rank 1's, …] on every rank. Carries no errors, unlike `share`."""
        if self.size == 1:
            return [mine]
        found = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def one_first(self, what: str, work: Callable[[], object]):
        """`work` on rank 0, then on all, who find on the disk what that has left there."""
        if self.size == 1:
            return work()
        self.on_first(what, lambda: bool(work()))
        return self.share(what, range(self.size), lambda _: [work()])[self.rank]

    def on_first(self, what: str, work: Callable[[], object]):
        """`work` on rank 0 alone; its result, or its error, on all."""
        return self.share(what, [None], lambda _: [work()])[0]

    # ----------------------------------------------------------------------------- the weights

    def shard(self, model: nn.Module) -> Callable[[str, Tensor], Tensor]:
        """Spread the parameters of a model on the meta device over the ranks, block by block.

        What lies outside the blocks (embedding, last norm, head) is one group: tied weights are one
        parameter, and the head stays whole from the forward to the loss and back.
        Returns what turns a whole tensor into this rank's share of it.
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

    def at(self, what: str) -> None:
        """Where this rank is, for the watchdog and the progress line to tell."""
        self.stage = what
        if self.store is not None:
            self.store.set(f"at {self.rank}", f"step {self.step}, {what}")

    def watch(self, patience: float) -> None:
        """A thread of each rank: when its `at` has not changed for `patience` seconds, it says who
        is waited for and ends the process.

        Each rank shows a sign of life now and then. One without is frozen or gone; one that lives
        but is elsewhere than the others is the one they wait for.
        """
        store = self.store.clone()  # its own connection: a call that waits would stall the loop
        changed: dict[str, tuple[bytes, float]] = {}
        names = [f"{x} {rank}" for rank in range(self.size) for x in ("at", "alive")]
        every = min(10.0, patience / 5)
        while not self.over.wait(every):
            try:
                store.set(f"alive {self.rank}", str(time.monotonic()))
                values = store.multi_get(names)
            except dist.DistError:
                if self.ending:
                    return  # whoever had the store has come to its end
                leave("ssr.py: torchrun does not answer: it, or the machine of rank 0, is gone")
            now = time.monotonic()
            for name, value in zip(names, values, strict=True):
                if changed.get(name, (None,))[0] != value:
                    changed[name] = value, now
            if now - changed[f"at {self.rank}"][1] < patience:
                continue
            silent = {r for r in range(self.size) if now - changed[f"alive {r}"][1] > 3 * every}
            places = [changed[f"at {r}"][0].decode() for r in range(self.size)]
            usual = max(set(places), key=places.count)
            lines = [
                f"  rank {r}{' gives no sign of life' if r in silent else ''}, last at: {place}"
                for r, place in enumerate(places)
                if r in silent or (place != usual and not silent)
            ]
            lines = lines or [f"  all of them are at: {usual}"]
            what = f"ssr.py: no progress for {patience:.0f} s (--patience). Who is waited for:"
            leave("\n".join([what, *lines[:8]]))


def join(device: str, patience: float = 1800.0, within_nodes: bool = False) -> Ranks:
    """The ranks that torchrun started, or one alone. Collective.

    `within_nodes`: the weights are spread over the ranks of a node and every node holds them all
    (hybrid sharding): less travels between nodes, more memory is taken.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Ranks()
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if device == "cuda":
        if local >= (found := torch.cuda.device_count()):
            raise ValueError(f"{per_node} processes on a machine with {found} GPUs: torchrun "
                             f"--nproc_per_node={found}")  # fmt: skip
        torch.cuda.set_device(local)
    # The watchdog speaks first: it knows more than a collective that ran out of time.
    limit = datetime.timedelta(seconds=2 * patience + 60)
    host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = connect(300, host)
    # torchrun may keep one store over its restarts, and a plain init_process_group then reads the
    # addresses of the dead. So names begin with the number of starts; with the largest of them, as
    # a node whose torchrun is new counts from 0 (all have a new store in that case).
    starts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    store.set(f"starts {rank}", str(starts))
    all_starts = [int(store.get(f"starts {r}")) for r in range(size)]
    store = dist.PrefixStore(f"start {max(all_starts)}", store)
    both = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(both, store=store, rank=rank, world_size=size, timeout=limit)
    group = dist.new_group(backend="gloo", timeout=limit)  # for objects, even beside NCCL
    ranks = Ranks(rank, size, None, group, store)
    nodes = set(ranks.gather(per_node))
    if within_nodes and (nodes != {per_node} or size % per_node):
        raise ValueError(f"--shard node needs the same number of ranks on every node, not {nodes}")
    shape, names = (size,), ("shard",)
    if within_nodes and size > per_node:
        shape, names = (size // per_node, per_node), ("copies", "shard")
    ranks.mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    ranks.at("start")
    store.set(f"alive {rank}", "")
    ranks.gather(None)  # all keys are there before a watchdog looks
    watchdog = threading.Thread(target=ranks.watch, args=(patience,), daemon=True)
    watchdog.start()

    def part() -> None:
        """Threads that are still in C++ when the interpreter goes would abort the process: ours,
        and those of a process group that nobody has taken down."""
        ranks.over.set()
        watchdog.join(timeout=10)  # its store may be gone
        if dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(part)
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (what is to be said is said once)
    return ranks


def connect(seconds: float = 5, host: bool = False):
    """The key-value store through which processes find each other. torchrun hosts it, or rank 0."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = datetime.timedelta(seconds=seconds)
    return dist.TCPStore(address, port, None, host, limit, wait_for_workers=False)


def leave(message: str):
    """End with an error, said by whichever rank is the first to have this to say."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(message)
    which = os.environ.get("TORCHELASTIC_RESTART_COUNT"), zlib.crc32(message.encode())
    try:
        if connect().add(f"said {which}", 1) > 1:
            time.sleep(1)  # torchrun ends all when one ends: the first must have spoken
            os._exit(1)
    except KeyboardInterrupt:  # torchrun's SIGTERM: another has ended, and has spoken
        os._exit(1)
    except dist.DistError as error:  # no store to ask: then each speaks for itself
        message += f" ({error.__class__.__name__})"
    who = f"rank {os.environ['RANK']} on {socket.gethostname()}"
    print(f"{message}  [{who}]", file=sys.stderr, flush=True)
    os._exit(1)  # threads that talk to ranks which are gone would never end


def is_lost(error: Exception) -> bool:
    """Whether it says no more than that another rank has gone."""
    said = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
    return said and dist.is_initialized()


# ---------------------------------------------------------------------------- weights, gradients


@torch.no_grad()
def follow(copies: Iterable[Tensor], weights: Iterable[Tensor], decay: float = 0.0) -> None:
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
