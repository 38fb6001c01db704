"""What is kept is whole, is ours, and is enough to go on."""

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

import checkpoint
import grpo
import ssr
from checkpoint import Checkpoints, tensors_of
from model import Config, Transformer
from ranks import Ranks
from tests import processes
from tests.processes import ROOT, free_port
from tests.test_ranks import SMALL, assert_same_run, go, lines, rows_of, train, wait_for
from toy.pretrain import Recipe, make

IDENTITY = {"settings": {"lr": 0.1, "steps": 3}, "model": {"layers": 1}, "texts": "a"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make(Recipe(tokens=1.5e5), tmp_path_factory.mktemp("toy"))


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
    assert os.readlink(tmp_path / "newest") == "step-000003"


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
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, state, capsys, damage, words):
    saved(tmp_path, state, 2, 3)
    damage(tmp_path / "step-000003")
    assert opened(tmp_path, state).restore()["step"] == 2
    assert (state["model.norm.weight"] == 2).all()
    out = capsys.readouterr().out
    assert "step-000003 is passed over" in out and words in out
    assert not (tmp_path / "step-000003").exists()  # it will be made again


def test_bytes_that_lie_are_an_error_with_the_folders_name(tmp_path, state):
    saved(tmp_path, state, 3)
    file = tmp_path / "step-000003" / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match="step-000003 cannot be read .*: delete it to go on"):
        opened(tmp_path, state).restore()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"lr": 0.2, "steps": 3}}, "other settings: --lr was 0.1 and is 0.2"),
        ({"settings": {"lr": 0.1, "steps": 3, "new_one": 1}}, "--new-one was None and is 1"),
        ({"model": {"layers": 2}}, r"another run: its model were \{'layers': 1\}, now"),
        ({"texts": "b"}, "another run: its texts were a, now it is b"),
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


def test_a_newer_format_is_refused(tmp_path, state, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    saved(tmp_path, state, 3)
    monkeypatch.setattr(checkpoint, "VERSION", 1)
    with pytest.raises(ValueError, match=r"newer version of this code \(format 2, this one reads"):
        opened(tmp_path, state).restore()


def test_what_a_kill_left_behind_is_cleared_away(tmp_path, state):
    saved(tmp_path, state, 2, 4)
    shutil.copytree(tmp_path / "step-000004", tmp_path / "step-000006.partial")
    shutil.rmtree(tmp_path / "step-000004")
    kept = opened(tmp_path, state)
    assert kept.restore()["step"] == 2
    assert sorted(x.name for x in tmp_path.glob("step*")) == ["step-000002"]
    kept.save(4, {})
    kept.wait()
    assert os.readlink(tmp_path / "newest") == "step-000004"
