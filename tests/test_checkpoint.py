"""Checkpoints are whole, of this run, and enough to resume it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import grpo
import ssr
from model import Config, Transformer
from run import checkpoint, driver, folder, monitor, settings
from run.checkpoint import Checkpoints, tensors_of
from run.distributed import Ranks
from tests import processes, runs
from tests.processes import ROOT, free_port
from tests.runs import (
    RANKS,
    assert_same_run,
    go_ranks,
    num_lines,
    rows_of,
    start_endless,
    train,
    wait_for,
)
from tests.tiny import make_model

IDENTITY = {"model": {"layers": 1}, "texts": "a"}


def tiny_model():
    torch.manual_seed(0)
    return Transformer(Config("qwen2", 17, 8, 12, 1, 2, 1, 4, 32, tied=True))


@pytest.fixture
def state():
    model = tiny_model()
    optimizer = grpo.make_optimizer(model, grpo.Settings())
    return tensors_of(model, optimizer, [torch.randn_like(p) for p in model.parameters()])


def opened(folder, state, identity=IDENTITY, keep=2):
    return Checkpoints(folder, keep, Ranks(), state, identity)


def saved(folder, state, *steps):
    kept = opened(folder, state)
    for step in steps:
        state["model.norm.weight"].fill_(step)
        kept.save(step, {"note": f"of {step}"})
        state["model.norm.weight"].fill_(-1)  # the copy is taken: training goes on at once
    kept.wait()
    assert kept.error == ""
    return kept


def test_a_checkpoint_gives_back_every_number(tmp_path, state):
    assert opened(tmp_path, state).restore() is None
    saved(tmp_path, state, 3)
    expected = {name: x.clone() for name, x in state.items()}
    expected["model.norm.weight"].fill_(3)
    for x in state.values():
        x.fill_(9)
    about = opened(tmp_path, state).restore()
    assert about["step"] == 3 and about["note"] == "of 3"
    assert any("average" in name for name in state) and any("exp_avg_sq" in name for name in state)
    for name, x in state.items():
        assert torch.equal(x, expected[name]), name


def test_the_optimizers_state_is_there_before_its_first_step_and_changes_nothing():
    models = [tiny_model(), tiny_model()]
    for i, model in enumerate(models):
        optimizer = grpo.make_optimizer(model, grpo.Settings(lr=0.1))
        if i:
            tensors_of(model, optimizer)
        for _ in range(3):
            model(torch.arange(5)[None]).square().sum().backward()
            optimizer.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


def test_adamw_in_host_memory_makes_the_same_steps(tmp_path):
    """To the last bit, at rates that change and beside a weight without a gradient."""
    make_model(tmp_path)
    policies = []
    for switch in ("--no-offload-optimizer", "--offload-optimizer"):
        s = settings.parse(["--preset=toy", "--weight-decay=0.1", switch])
        policies.append(driver.build_policy(tmp_path, s, torch.device("cpu"), Ranks(), 1, 32))
        kept, optimizer = policies[-1].tensors(), policies[-1].optimizer
        assert isinstance(optimizer, driver.HostAdamW) == (switch == "--offload-optimizer")
        for lr in (0.1, 0.02, 0.05):
            for group in optimizer.param_groups:
                group["lr"] = lr
            policies[-1].model(torch.arange(5)[None]).square().sum().backward()
            next(policies[-1].model.parameters()).grad = None
            optimizer.step()
        for name, x in policies[-1].tensors().items():  # what a checkpoint holds is what was used
            assert torch.equal(x, kept[name])
    one, other = (policy.tensors() for policy in policies)
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


def test_adamw_in_host_memory_computes_where_the_weights_are(monkeypatch):
    """Fake tensors have a device and no numbers."""
    seen = set()

    def adamw(*lists, **_):
        seen.update(x.device.type for tensors in lists for x in tensors)

    monkeypatch.setattr(driver, "adamw", adamw)
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.zeros(3, 4, device="cuda"))
        weight.grad = torch.zeros(3, 4, device="cuda")
        optimizer = driver.HostAdamW(torch.optim.AdamW([weight]))
        optimizer.step()
    assert seen == {"cuda"}
    state = optimizer.state[weight]
    assert state["exp_avg"].device.type == state["exp_avg_sq"].device.type == "cpu"


def test_the_newest_are_kept_and_restored(tmp_path, state):
    saved(tmp_path, state, 1, 999_999, 1_000_000)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    assert opened(tmp_path, state).restore()["step"] == 1_000_000


def test_what_cannot_be_restored_is_an_error_that_says_why(tmp_path, state, monkeypatch):
    saved(tmp_path, state, 2, 3)
    with pytest.raises(ValueError, match="another run: the texts it began with: a, now: b"):
        opened(tmp_path, state, IDENTITY | {"texts": "b"}).restore()
    with (
        monkeypatch.context() as other,
        pytest.raises(ValueError, match="reads format 1:"),
    ):
        other.setattr(checkpoint, "VERSION", 1)
        opened(tmp_path, state).restore()

    file = tmp_path / "step-000003" / "__0_0.distcp"
    for content in (bytes(file.stat().st_size), b"short"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"step-000003 cannot be read .*delete it to resume"):
            opened(tmp_path, state).restore()
    shutil.rmtree(file.parent)
    assert opened(tmp_path, state).restore()["step"] == 2


def test_what_a_kill_left_behind_is_cleared_away(tmp_path, state):
    saved(tmp_path, state, 2, 4)
    shutil.copytree(tmp_path / "step-000004", tmp_path / "step-000006.partial")
    shutil.rmtree(tmp_path / "step-000004")
    kept = opened(tmp_path, state)
    assert kept.restore()["step"] == 2
    for step in (4, 6):
        kept.save(step, {})
        kept.wait()
        assert kept.error == ""
    assert sorted(x.name for x in tmp_path.glob("step*")) == ["step-000004", "step-000006"]


def test_a_log_is_cut_at_a_step_whatever_is_in_it(tmp_path):
    log = folder.RunFolder(tmp_path, is_writer=True)
    log.add("groups.jsonl", [{"step": i, "text": f"a\u2028b\u0085{i} 灿烂"} for i in range(4)])
    whole = (tmp_path / "groups.jsonl").read_bytes()
    for torn in (b"", whole[:-3], b'{"step": 9', "灿".encode()[:2]):  # what a kill leaves behind
        (tmp_path / "groups.jsonl").write_bytes(whole + torn)
        log.cut("groups.jsonl", 3)
        rows = whole.split(b"\n")[:3]
        assert (tmp_path / "groups.jsonl").read_bytes() == b"".join(row + b"\n" for row in rows)


# ------------------------------------------------------------------------------------ whole runs


def filling_up(rank, words):
    """From step 3 on no file may be longer than the weights: a checkpoint is three times that."""
    import resource

    real = monitor.RunMonitor.after

    def after(self, step):
        if step.number == 3:
            self.checkpoints.wait()
            size = sum(p.nbytes for p in self.evaluation.sampler.model.parameters()) + 20_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        real(self, step)

    monitor.RunMonitor.after = after
    ssr.main(words)


def test_a_disk_that_is_full_at_a_save_is_reported_and_the_checkpoint_before_is_whole(
    toy, tmp_path
):
    run, words = tmp_path / "run", [f"--model={toy}", "--steps=4", "--save-every=2"]
    done = processes.run(tmp_path / "said", 2, filling_up, [*RANKS, f"--folder={run}", *words])
    assert done.codes == [1, 1]
    err = "".join(done.err)
    assert "step-000004 could not be written (" in err and "Traceback" not in err
    assert "the one before is whole, and the run continues" in err
    assert [x.name for x in (run / "checkpoints").glob("step*")] == ["step-000002"]
    assert num_lines(run / "metrics.jsonl") == 5  # it went on to its end
    go_ranks(run, 1, *words, "--resume")
    assert (run / "checkpoints" / "step-000004").is_dir()


def test_resume_takes_the_newest_run_with_its_own_settings(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("toy-20250101-000000", "toy-20260101-000000", "toy-mine"):
        ssr.main([*RANKS, f"--model={toy}", f"--folder=runs/{name}", "--steps=2", "--kl=0.1"])
    capsys.readouterr()
    ssr.main(["--preset=toy", "--steps=3", "--save-every=7", "--resume"])
    out, run = capsys.readouterr().out, tmp_path / "runs/toy-20260101-000000"
    assert "writing runs/toy-20260101-000000, after step 2" in out
    changed = json.loads((run / "settings.json").read_text())
    assert changed["kl"] == 0.1 and changed["prompts_per_step"] == 5
    assert [r["step"] for r in rows_of(run / "metrics.jsonl")] == [0, 1, 2, 3]
    resume = ["--preset=toy", "--resume"]
    runs.refuses([*resume, "--steps=1"], r"is at step 3 already, beyond --steps 1$")
    runs.refuses([*resume, "--lr=0.5"], r"--lr was 0\.002 in the saved run and is 0\.5 now")
    # Without a checkpoint it is not written over unless it is the same run.
    shutil.rmtree(run / "checkpoints")
    runs.refuses(resume, "has come to its end, and has no checkpoint")
    (run / "result.json").unlink()
    ssr.main([*resume, "--steps=2"])
    assert num_lines(run / "metrics.jsonl") == 3


def test_two_runs_cannot_write_one_folder(toy, tmp_path):
    run = tmp_path / "run"
    first = start_endless(run, 1, f"--model={toy}")
    runs.refuses([f"--folder={run}", "--resume"],
                 rf"written by another run \(process {first[0].pid} on")  # fmt: skip
    first[0].kill()
    first[0].join()
    go_ranks(run, 1, "--resume", "--steps=3")


def test_sigterm_ends_what_comes_before_the_first_step_also_in_the_background(tmp_path):
    """A shell lets its background jobs ignore SIGINT."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "ssr.py"), "--preset=toy", "--seed=1"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        env=os.environ | {"SSR_TOY_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert "pretraining" in process.stdout.readline()
    assert "pretraining" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "ssr.py: stopped" in err


def test_a_longer_run_knows_that_its_old_last_step_was_the_best(toy, tmp_path, monkeypatch):
    """Step 3 was evaluated because it was the last, and its weights are in best/."""
    runs.set_quality(monkeypatch, {0: 0.1, 2: 0.2, 3: 0.9, 4: 0.3, 5: 0.4}.__getitem__)
    words = [*RANKS, f"--model={toy}", f"--folder={tmp_path / 'run'}"]
    ssr.main([*words, "--steps=3"])
    ssr.main([*words, "--steps=5", "--resume"])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["best_step"] == 3


# --------------------------------------------------------------------------------- slow proofs


def torchrun(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--master-port={free_port()}", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def is_saving(checkpoints, since):
    try:
        return any(path.stat().st_mtime > since for path in checkpoints.glob("*.partial"))
    except FileNotFoundError:  # it has just become whole
        return False


@pytest.mark.slow
def test_six_kills_at_random_instants_lose_nothing(toy, tmp_path):
    """SIGKILL of one rank or of both: before and while the state is read, in steps, in saves."""
    words = [f"--model={toy}", "--steps=30", "--save-every=1", "--eval-every=20", "--judge=ema"]
    words += ["--prompts-per-step=2", "--eval-prompts=4", "--lr=1e-4"]
    go_ranks(tmp_path / "whole", 2, *words)
    run, rng, cut_off = tmp_path / "parts", random.Random(1), 0
    resumed = [*RANKS, *words, f"--folder={run}", "--resume"]
    for kill in range(6):
        started, before = time.time(), num_lines(run / "metrics.jsonl")
        ranks = processes.start(tmp_path / "output", 2, train, resumed)
        if kill % 3 == 1:  # in a save of this process
            wait_for(lambda started=started: is_saving(run / "checkpoints", started), pause=0.001)
        elif kill % 3 == 2:
            wait_for(lambda before=before: num_lines(run / "metrics.jsonl") != before)
            time.sleep(rng.uniform(0, 0.2))
        else:  # mostly before the first step
            time.sleep(rng.uniform(0, 0.6))
        for rank in ranks if kill % 2 else [ranks[rng.randrange(2)]]:
            rank.kill()
        done = processes.finish(tmp_path / "output", ranks, grace=2)
        assert "Traceback" not in "".join(done.err), done.err
        cut_off += len(list((run / "checkpoints").glob("*.partial")))
    assert cut_off and not (run / "result.json").exists()
    go_ranks(run, 2, *words, "--resume")
    assert_same_run(tmp_path / "whole", run)


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_again_and_the_run_resumes_by_itself(toy, tmp_path):
    words = [f"--model={toy}", "--steps=10", "--save-every=3", "--lr=1e-4"]
    go_ranks(tmp_path / "whole", 2, *words)
    run = tmp_path / "parts"
    process = torchrun("--nproc_per_node=2", "--max-restarts=2", "ssr.py", *RANKS, *words,
                       f"--folder={run}")  # fmt: skip

    def workers() -> list[int]:
        command = ["pgrep", "-P", str(process.pid), "-f", "ssr.py"]
        output = subprocess.run(command, capture_output=True, text=True).stdout
        return [int(number) for number in output.split()]

    for count in (3, 7):
        wait_for(lambda count=count: num_lines(run / "metrics.jsonl") > count)
        old = workers()
        os.kill(old[1], signal.SIGKILL)
        wait_for(lambda old=old: len(workers()) == 2 and not set(workers()) & set(old))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert_same_run(tmp_path / "whole", run)


@pytest.mark.slow
def test_two_nodes_with_an_agent_each(toy, tmp_path):
    """On loopback."""
    words = [f"--model={toy}", "--steps=3"]
    go_ranks(tmp_path / "one", 1, *words)
    port = free_port()
    agents = [
        torchrun("--nnodes=2", f"--node-rank={node}", "--nproc_per_node=2", f"--master-port={port}",
                 "--master-addr=127.0.0.1", "ssr.py", *RANKS, *words,
                 f"--folder={tmp_path / 'two'}")
        for node in range(2)
    ]  # fmt: skip
    out = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], out
    rows = [rows_of(tmp_path / run / "metrics.jsonl") for run in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        for key in ("reward/total", "eval/quality", "policy/entropy"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5)


def test_restarted_ranks_find_the_run_that_their_torchrun_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, launcher in (("1", folder.launcher()), ("2", "another 1")):
        run = tmp_path / "runs" / f"toy-20260101-00000{name}"
        run.mkdir(parents=True)
        (run / "settings.json").write_text(json.dumps({"about": {"launcher": launcher}}))
    assert settings.run_folder("toy", "", True).name == "toy-20260101-000002"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert settings.run_folder("toy", "", True).name == "toy-20260101-000001"
