"""What is kept is whole, is ours, and is enough to go on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import grpo
import ssr
import watch
from checkpoint import Checkpoints, tensors_of
from model import Config, Transformer, save
from ranks import Ranks
from tests import processes
from tests.processes import ROOT, free_port
from tests.test_ranks import SMALL, assert_same_run, go, lines, rows_of, train, wait_for

IDENTITY = {
    "settings": {"lr": 0.1, "steps": 3},
    "model": {"layers": 1},
    "texts": "a",
    "weights": "b",
}


@pytest.fixture
def state():
    torch.manual_seed(0)
    model = Transformer(Config("qwen2", 17, 8, 12, 1, 2, 1, 4, 32, tied=True))
    optimizer = grpo.make_optimizer(model, grpo.Settings())
    return tensors_of(model, optimizer, [torch.randn_like(p) for p in model.parameters()])


def opened(folder, state, identity=IDENTITY, keep=2):
    return Checkpoints(folder, keep, Ranks(), state, identity, "steps keep")


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
    torch.manual_seed(0)
    models = [Transformer(Config("qwen2", 17, 8, 12, 1, 2, 1, 4, 32, tied=True)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for i, model in enumerate(models):
        optimizer = grpo.make_optimizer(model, grpo.Settings(lr=0.1))
        if i:
            tensors_of(model, optimizer)
        for _ in range(3):
            model(torch.arange(5)[None]).square().sum().backward()
            optimizer.step()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


def test_the_newest_are_kept_and_newest_points_to_the_last(tmp_path, state):
    saved(tmp_path, state, 1, 2, 3)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["newest", "step-000002", "step-000003"]
    assert (tmp_path / "newest").read_text() == "step-000003\n"


def test_nothing_kept_is_nothing_to_restore(tmp_path, state):
    assert opened(tmp_path / "none", state).restore() is None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: os.truncate(f / "__0_0.distcp", 100), "has 100 bytes instead of"),
        (lambda f: (f / "__0_0.distcp").unlink(), "FileNotFoundError"),
        (lambda f: (f / "state.json").write_text('{"step": 3'), "JSONDecodeError"),
        (lambda f: (f / "state.json").unlink(), "FileNotFoundError"),
        (lambda f: (f / "state.json").write_text("[]"), "TypeError"),
    ],
)
def test_a_damaged_checkpoint_is_put_aside_and_said(tmp_path, state, capsys, damage, words):
    saved(tmp_path, state, 2, 3)
    damage(tmp_path / "step-000003")
    assert opened(tmp_path, state).restore()["step"] == 2
    assert (state["model.norm.weight"] == 2).all()
    out = capsys.readouterr().out
    assert "step-000003 is not whole (" in out and words in out and "put aside as" in out
    assert not (tmp_path / "step-000003").exists()  # its step will be made again
    assert (tmp_path / "step-000003.damaged").is_dir()


def test_what_is_damaged_is_not_in_the_way_of_what_comes(tmp_path, state):
    """Were it counted as newest, each new checkpoint would be the oldest, and go."""
    saved(tmp_path, state, 100)
    (tmp_path / "step-000100" / ".metadata").unlink()
    kept = opened(tmp_path, state, keep=1)
    assert kept.restore() is None
    for step in (25, 50, 100):
        kept.save(step, {})
        kept.wait()
        assert [x.name for x in tmp_path.glob("step*[0-9]")] == [f"step-{step:06}"]


def test_an_error_of_the_disk_is_no_damage(tmp_path, state, monkeypatch):
    saved(tmp_path, state, 2, 3)

    def read_text(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.Path, "read_text", read_text)
    with pytest.raises(OSError, match="Input/output error"):
        opened(tmp_path, state).restore()
    assert len(list(tmp_path.glob("step*[0-9]"))) == 2


def test_the_newest_is_the_highest_number(tmp_path, state):
    saved(tmp_path, state, 999_999, 1_000_000)
    assert opened(tmp_path, state).restore()["step"] == 1_000_000


def test_bytes_that_lie_are_an_error_with_the_folders_name(tmp_path, state):
    saved(tmp_path, state, 3)
    file = tmp_path / "step-000003" / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match=r"step-000003 cannot be read .*: delete it to go on"):
        opened(tmp_path, state).restore()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"lr": 0.2, "steps": 3}}, "other settings: --lr was 0.1 and is 0.2"),
        ({"settings": {"lr": 0.1, "steps": 3, "new_one": 1}}, "--new-one was None and is 1"),
        ({"model": {"layers": 2}}, r"another run: the model it began with: \{'layers': 1\}, now:"),
        ({"texts": "b"}, "another run: the texts it began with: a, now: b"),
        ({"weights": "c"}, "another run: the weights it began with: b, now: c"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path, state, change, words):
    saved(tmp_path, state, 3)
    with pytest.raises(ValueError, match=words):
        opened(tmp_path, state, IDENTITY | change).restore()
    assert (tmp_path / "step-000003").exists()


def test_what_may_differ_may_differ(tmp_path, state):
    saved(tmp_path, state, 3)
    longer = IDENTITY | {"settings": {"lr": 0.1, "steps": 99}}
    assert opened(tmp_path, state, longer).restore()["step"] == 3


@pytest.mark.parametrize(("written", "words"), [(1, "an older"), (99, "a newer")])
def test_another_format_is_refused(tmp_path, state, monkeypatch, written, words):
    with monkeypatch.context() as other:
        other.setattr(checkpoint, "VERSION", written)
        saved(tmp_path, state, 3)
    with pytest.raises(ValueError, match=rf"by {words} version of this code \(format {written},"):
        opened(tmp_path, state).restore()


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
    assert (tmp_path / "newest").read_text() == "step-000006\n"


def test_other_weights_have_another_fingerprint(tmp_path):
    model = Transformer(Config("qwen2", 17, 8, 12, 1, 2, 1, 4, 32, tied=True))
    save(model, tmp_path)
    first = checkpoint.fingerprint(tmp_path)
    assert checkpoint.fingerprint(tmp_path) == first
    with torch.no_grad():
        model.norm.weight.mul_(1.1)
    save(model, tmp_path)
    assert checkpoint.fingerprint(tmp_path) != first


# ------------------------------------------------------------------------------------ whole runs


def filling_up(rank, words):
    """From step 3 on no file may be longer than the weights alone: a checkpoint is three times
    that."""
    import resource

    real = ssr.Watch.after

    def after(self, step):
        if step.number == 3:
            self.kept.wait()
            size = sum(p.nbytes for p in self.model.parameters()) + 20_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        real(self, step)

    ssr.Watch.after = after
    ssr.main(words)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_a_save_is_said_and_the_one_before_is_whole(toy, tmp_path, size):
    run = tmp_path / "run"
    words = [*SMALL, f"--model={toy}", f"--folder={run}", "--steps=4", "--save-every=2"]
    done = processes.run(tmp_path / "said", size, filling_up, words)
    assert done.codes == [1] * size
    said = "".join(done.err)
    assert "step-000004 could not be written (" in said and " GB free there): make room" in said
    assert "make room; the one before is whole, and the run goes on" in said
    assert "Traceback" not in said
    assert [x.name for x in (run / "checkpoints").glob("step*")] == ["step-000002"]
    assert len(lines(run / "metrics.jsonl")) == 5  # it went on to its end
    go(run, size, f"--model={toy}", "--steps=4", "--save-every=2", "--resume")
    assert (run / "checkpoints" / "newest").read_text() == "step-000004\n"


def test_a_folder_that_is_no_run_is_left_alone(toy, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(SystemExit, match=r"is not the folder of a run: it has no settings\.json"):
        ssr.main([*SMALL, f"--model={toy}", f"--folder={tmp_path}", "--resume"])
    assert [x.name for x in tmp_path.iterdir()] == ["precious"]


def test_resume_without_a_folder_takes_the_newest_run(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("toy-20250101-000000", "toy-20260101-000000", "toy-mine"):
        ssr.main([*SMALL, f"--model={toy}", f"--folder=runs/{name}", "--steps=2"])
    capsys.readouterr()
    ssr.main([*SMALL, f"--model={toy}", "--steps=3", "--resume"])
    assert "writing runs/toy-20260101-000000, after step 2" in capsys.readouterr().out
    assert [r["step"] for r in rows_of(tmp_path / "runs/toy-20260101-000000/metrics.jsonl")] == [
        0, 1, 2, 3
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=r"is at step 3 already, beyond --steps 1$"):
        ssr.main([*SMALL, f"--model={toy}", "--steps=1", "--resume"])
    with pytest.raises(SystemExit, match=r"other settings: --lr was 0\.002 and is 0\.5"):
        ssr.main([*SMALL, f"--model={toy}", "--steps=3", "--resume", "--lr=0.5"])


def test_a_run_without_a_checkpoint_is_not_written_over_unless_it_is_the_same(toy, tmp_path):
    words = [*SMALL, f"--model={toy}", f"--folder={tmp_path / 'run'}"]
    ssr.main([*words, "--steps=2"])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(SystemExit, match=r"has come to its end, and has no checkpoint"):
        ssr.main([*words, "--steps=2", "--resume"])
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(SystemExit, match=r"other settings: --kl was 0\.0 and is 0\.7"):
        ssr.main([*words, "--steps=2", "--resume", "--kl=0.7"])
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 3
    ssr.main([*words, "--steps=2", "--resume"])
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 3


def test_a_run_goes_on_with_its_own_settings_and_says_what_is_new(toy, tmp_path, capsys):
    run = tmp_path / "run"
    ssr.main([*SMALL, f"--model={toy}", f"--folder={run}", "--steps=2", "--kl=0.1"])
    capsys.readouterr()
    ssr.main([f"--folder={run}", "--resume", "--steps=3", "--save-every=7"])
    out = capsys.readouterr().out
    assert (
        "Going on with other settings: --steps was 2 and is 3; --save-every was 25 and is 7" in out
    )
    settings = json.loads((run / "settings.json").read_text())
    assert settings["kl"] == 0.1 and settings["prompts_per_step"] == 5
    assert len(lines(run / "metrics.jsonl")) == 4


def test_two_runs_cannot_write_one_folder(toy, tmp_path):
    words = [*SMALL, f"--model={toy}", f"--folder={tmp_path / 'run'}", "--steps=100000"]
    first = processes.start(tmp_path / "said", 1, train, words)
    wait_for(lambda: len(lines(tmp_path / "run" / "metrics.jsonl")) > 2)
    with pytest.raises(SystemExit, match=rf"written by another run \(process {first[0].pid} on"):
        ssr.main([*words, "--resume"])
    first[0].kill()
    first[0].join()
    go(tmp_path / "run", 1, f"--model={toy}", "--steps=3", "--resume")


def test_sigterm_ends_what_comes_before_the_first_step_also_in_the_background(tmp_path):
    """A shell lets its background jobs ignore SIGINT."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "ssr.py"), "--preset=toy", "--seed=1"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert "SSR-Zero" in process.stdout.readline()
    assert "pretraining" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "ssr.py: stopped" in err


def test_a_longer_run_knows_that_its_old_last_step_was_the_best(toy, tmp_path, monkeypatch):
    """Step 3 was evaluated because it was the last, and its weights are in best/."""
    quality = {0: 0.1, 2: 0.2, 3: 0.9, 4: 0.3, 5: 0.4}
    judged = watch.Evaluation.__call__

    def measured(self, number):
        self.problem.measures = {"exact_match": lambda tasks, texts: [quality[number]] * len(texts)}
        return judged(self, number)

    monkeypatch.setattr(watch.Evaluation, "__call__", measured)
    words = [*SMALL, f"--model={toy}", f"--folder={tmp_path / 'run'}"]
    ssr.main([*words, "--steps=3"])
    ssr.main([*words, "--steps=5", "--resume"])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["best_step"] == 3


def test_a_log_is_cut_where_it_must_be_whatever_is_in_it(tmp_path):
    folder = watch.RunFolder(tmp_path, mine=True)
    rows = [{"step": i, "text": f"a\u2028b\u0085{i} 灿烂"} for i in range(4)]
    folder.add("groups.jsonl", rows)
    whole = (tmp_path / "groups.jsonl").read_bytes()
    for torn in (b"", whole[:-3], b'{"step": 9', "灿".encode()[:2]):  # what a kill leaves behind
        (tmp_path / "groups.jsonl").write_bytes(whole + torn)
        folder.cut("groups.jsonl", 3)
        assert (tmp_path / "groups.jsonl").read_bytes() == b"".join(
            row + b"\n" for row in whole.split(b"\n")[:3]
        )


def test_what_the_run_has_on_the_disk_already_is_not_asked_for_again(tmp_path, monkeypatch):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "x").write_bytes(bytes(3000))
    monkeypatch.setattr(watch.shutil, "disk_usage", lambda path: SimpleNamespace(free=2500))
    monkeypatch.chdir(tmp_path)  # where no run is that could go on
    s = ssr.parse([*SMALL, "--resume"])
    watch.RunFolder(tmp_path / "run", mine=True).begin(s, 5000, None)
    with pytest.raises(OSError, match="are needed"):
        watch.RunFolder(tmp_path / "other", mine=True).begin(s, 5000, None)


def torchrun(*words, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, **more,
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_says_once_what_is_wrong():
    process = torchrun(
        "--nproc_per_node=2", f"--master-port={free_port()}", "ssr.py", "--sampels-per-prompt=4"
    )
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 1
    assert out.count("did you mean --samples-per-prompt?") == 1


# --------------------------------------------------------------------------------- slow proofs


def saving(checkpoints, since):
    try:
        return any(path.stat().st_mtime > since for path in checkpoints.glob("*.partial"))
    except FileNotFoundError:  # it has just become whole
        return False


@pytest.mark.slow
def test_twenty_kills_at_random_instants_lose_nothing(toy, tmp_path):
    """SIGKILL of one rank or of both, at any point from the start on, saves included."""
    words = [f"--model={toy}", "--steps=150", "--save-every=1", "--eval-every=10", "--judge=ema"]
    words += ["--lr=1e-4", "--max-bad-steps=1000"]
    go(tmp_path / "whole", 2, *words)
    run, rng, cut_off, reached = tmp_path / "parts", random.Random(1), 0, []
    words = [*SMALL, *words]
    for kill in range(20):
        ranks = processes.start(
            tmp_path / "said", 2, train, [*words, f"--folder={run}", "--resume"]
        )
        before = len(lines(run / "metrics.jsonl"))
        if kill % 4:  # one kill in four comes before or while the state is read
            wait_for(lambda before=before: len(lines(run / "metrics.jsonl")) != before)
        if kill % 4 == 3:  # in a save of this process
            started = time.time()
            wait_for(lambda started=started: saving(run / "checkpoints", started))
        else:
            time.sleep(rng.uniform(0, 0.6))
        for rank in ranks if kill % 2 else [ranks[rng.randrange(2)]]:
            rank.kill()
        done = processes.finish(tmp_path / "said", ranks, grace=2)
        assert "Traceback" not in "".join(done.err), done.err
        cut_off += len(list((run / "checkpoints").glob("*.partial")))
        reached.append(len(lines(run / "metrics.jsonl")))
    print(f"kills after {reached} rows, {cut_off} of them in a save")
    assert cut_off and not (run / "result.json").exists()
    go(run, 2, *words, "--resume")
    assert_same_run(tmp_path / "whole", run)


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_again_and_the_run_goes_on_by_itself(toy, tmp_path):
    words = [*SMALL, f"--model={toy}", "--steps=40", "--save-every=5", "--lr=1e-4"]
    go(tmp_path / "whole", 2, *words)
    process = torchrun(
        "--nproc_per_node=2", "--max-restarts=2", f"--master-port={free_port()}", "ssr.py", *words,
        f"--folder={tmp_path / 'parts'}",
    )  # fmt: skip

    def workers() -> list[int]:
        command = ["pgrep", "-P", str(process.pid), "-f", "ssr.py"]
        found = subprocess.run(command, capture_output=True, text=True).stdout
        return [int(number) for number in found.split()]

    for count in (8, 23):
        wait_for(lambda count=count: len(lines(tmp_path / "parts" / "metrics.jsonl")) > count)
        old = workers()
        os.kill(old[1], signal.SIGKILL)
        wait_for(lambda old=old: len(workers()) == 2 and not set(workers()) & set(old))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_nodes_with_an_agent_each(toy, tmp_path):
    """On loopback: weights spread within a node, copied across."""
    words = [f"--model={toy}", "--steps=3"]
    go(tmp_path / "one", 1, *words)
    port = free_port()
    agents = [
        torchrun(
            "--nnodes=2", f"--node-rank={node}", "--nproc_per_node=2", "--master-addr=127.0.0.1",
            f"--master-port={port}", "ssr.py", *SMALL, *words, "--shard=node",
            f"--folder={tmp_path / 'two'}",
        )
        for node in range(2)
    ]  # fmt: skip
    out = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], out
    rows = [rows_of(tmp_path / run / "metrics.jsonl") for run in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        for key in ("reward/total", "eval/quality", "policy/entropy"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5)


@pytest.mark.slow
def test_sigterm_to_torchrun_keeps_the_last_step(toy, tmp_path):
    run = tmp_path / "run"
    process = torchrun(
        "--nproc_per_node=2", f"--master-port={free_port()}", "ssr.py", *SMALL, f"--model={toy}",
        "--steps=100000", f"--folder={run}",
    )  # fmt: skip
    wait_for(lambda: len(lines(run / "metrics.jsonl")) > 5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=180)
    rows = rows_of(run / "metrics.jsonl")
    newest = (run / "checkpoints" / "newest").read_text().strip()
    assert newest == f"step-{rows[-1]['step']:06}" and "go on with --resume" in out, out
