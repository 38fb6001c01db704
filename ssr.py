"""SSR-Zero: a language model translates, judges its own translations, and learns from the scores.

    python ssr.py                              # on a laptop: the embedded toy, in a minute
    torchrun --nproc_per_node=8 ssr.py         # on eight GPUs: the paper's run
    python ssr.py --preset ssr-zero-0.5b --data texts.jsonl      # your own texts
    python ssr.py --resume --folder runs/mine  # continue from the newest checkpoint
    python ssr.py --preset ssr-zero-7b --dry-run 8xh100          # does it fit, how long is a step
    python ssr.py --help                       # every setting

A run writes a folder: settings.json; metrics.jsonl, a row a step, the first one before any
training; evaluations.jsonl, the held-out translations with their scores and the judge's words;
groups.jsonl, samples of training; checkpoints/; last/ and, where a step was better than the start,
best/, Hugging Face folders; result.json at its end. Exit code 3: it ended, and nothing was learned.
"""

import contextlib
import dataclasses
import os
import signal
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # read when torch loads: spinning threads stall each other on busy cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import grpo
from data.codec import PromptCodec, load_tokenizer
from data.languages import identifier_version, is_plausible_translation
from judge import Reward, Task
from model import Config, find_folder, read_config
from rewards import family
from rewards.build import (
    CometWorkers,
    build_judge,
    build_remote_judge,
    build_scorers,
    checkpoint_id,
    custom_parts,
    toy_skills,
)
from run import driver, estimate
from run.checkpoint import Checkpoints, fingerprint
from run.distributed import Ranks, interrupt, run_with_error_reporting
from run.evaluation import Evaluation
from run.folder import commit
from run.monitor import RunMonitor
from run.problem import Problem, data_problem, judge_template, judge_window, toy_problem
from run.settings import Settings, describe_run, parse, run_folder
from toy.languages import Languages
from toy.pretrain import Recipe, make_tokenizer, model_config


def run_training(s: Settings) -> None:
    device, ranks = driver.init_device_and_ranks(s)
    with contextlib.closing(CometWorkers(s, device)) as comets:
        if "comet" in s.reward.split("+"):
            comets.start(s.comet)  # it loads in the background

        # What is learned: the texts, the prompts, how held-out translations are measured.
        problem = toy_problem(s, ranks) if s.preset == "toy" else data_problem(s, ranks, comets)
        codec = PromptCodec(load_tokenizer(problem.folder), s.chat)

        # The model and its sampler. The judge has the policy's weights, live or as --judge says
        # (frozen, an average, previous ones), or is another model.
        cuda = device.type == "cuda"
        room = ranks.on_rank0("memory", lambda: estimate.available_bytes(device))
        ranks.set_stage("load the model")
        load_work = workload(s, read_config(problem.folder), ranks.size, cuda, room)
        estimate.check_room(load_work, device)
        window = judge_window(s, problem, codec, load_work.c.max_length)
        slots, judge_slots = load_work.slots, load_work.judge_slots
        policy = driver.build_policy(problem.folder, s, device, ranks, slots, window, judge_slots)
        policy.model.checkpointing = load_work.recomputes
        own_judge = build_judge(s, policy.judge_sampler, codec, problem.prompts)
        judge = own_judge
        if s.judge_model:
            judge = other_judge(s, ranks, problem, device, slots, codec)
        elif s.reward == "cream":  # the live judge scores, and is compared with `own_judge`
            judge = build_judge(s, policy.sampler, codec, problem.prompts)

        # The reward: the judge's score of what has the right form.
        ranks.set_stage("load COMET")
        scorers = build_scorers(s, judge, comets)
        weigh = partial(family.agreement, own_judge) if s.reward == "cream" else None
        reward = Reward(
            codec, problem.prompts, scorers, s.format_reward, weigh, is_plausible_translation
        )

        # The loop: driver.train_policy is grpo.train, with this policy's copies kept in step.
        path = ranks.on_rank0("name the run", lambda: run_folder(s.preset, s.folder, s.resume))
        identity = run_identity(s, problem, policy, comets)
        versions = {"code": commit(), "PyTorch version": torch.__version__}
        same = {f"the {k}": v for k, v in (identity | versions).items()}
        driver.assert_same_on_all_ranks(ranks, same)
        checkpoints = Checkpoints(path / "checkpoints", 2, ranks, policy.tensors(), identity)
        held_out = encode_prompts(s, problem, codec, problem.held_out)
        evaluation = Evaluation(problem, held_out, codec, policy.sampler, judge, s, ranks)
        monitor = RunMonitor(s, path, problem.folder, evaluation, checkpoints, ranks)

        def batch(number: int) -> list[grpo.Prompt]:
            P = s.prompts_per_step
            tasks = [problem.task(i) for i in range((number - 1) * P, number * P)]
            return encode_prompts(s, problem, codec, tasks)

        with monitor:
            resume_from = monitor.begin(policy, describe_run(s))
            for step in driver.train_policy(
                policy, reward, batch, s, codec.stop_ids, ranks, resume_from
            ):
                monitor.after(step)
    if monitor.finished and not monitor.has_learned:
        sys.exit(3)


def encode_prompts(
    s: Settings, problem: Problem, codec: PromptCodec, tasks: list[Task]
) -> list[grpo.Prompt]:
    encoded = codec.encode([problem.prompts.ask(task) for task in tasks])
    if (longest := max(map(len, encoded))) > s.max_prompt_tokens:  # data_problem leaves those out
        raise ValueError(f"a prompt has {longest} tokens: --max-prompt-tokens "
                         f"{s.max_prompt_tokens} must be at least that")  # fmt: skip
    return [grpo.Prompt(ids, task) for ids, task in zip(encoded, tasks, strict=True)]


def other_judge(
    s: Settings, ranks: Ranks, problem: Problem, device, slots: int, policy_codec: PromptCodec
):
    """Another model, which is asked as the policy would ask itself."""
    if s.judge_url:
        return build_remote_judge(s, ranks, problem.prompts)
    folder = ranks.rank0_then_all("fetch the judge", lambda: find_folder(s.judge_model))
    model, codec = driver.load_frozen(folder, device, s.chat)
    # Its tokenizer may need more tokens for the same texts than the policy's.
    prompts = [problem.prompts.ask(task) for task in problem.held_out]
    pairs = zip(codec.encode(prompts), policy_codec.encode(prompts), strict=True)
    longer = max(1.0, 1.25 * max(len(theirs) / len(ours) for theirs, ours in pairs))
    window = judge_window(s, problem, codec, model.config.max_length, longer)
    return build_judge(s, driver.make_sampler(model, slots, window), codec, problem.prompts)


def run_identity(s: Settings, problem: Problem, policy: driver.Policy, comets) -> dict:
    """What must be the same on all ranks, and when the run is resumed, besides its settings."""
    shape = {k: v for k, v in dataclasses.asdict(policy.model.config).items() if k != "hub"}
    identity = {"model": shape, "texts": problem.digest}
    identity["weights, tokenizer or chat template"] = fingerprint(problem.folder)
    identity["language identifier"] = None if s.preset == "toy" else identifier_version()
    if s.judge_model and not s.judge_url:
        judge = fingerprint(find_folder(s.judge_model))
        identity["judge's weights, tokenizer or chat template"] = judge
    for part in custom_parts(s.reward):
        file = Path(part.rpartition(":")[0]).expanduser()
        identity[f"file of --reward {part}"] = fingerprint(file)
    for name, comet in comets.started.items():
        identity[f"COMET {Path(name).name}"] = comet.ready()["revision"] or checkpoint_id(name)
    return identity


def workload(s: Settings, config: Config, size: int, cuda: bool, room: float) -> estimate.Workload:
    other = estimate.find_config(s.judge_model) if s.judge_model and not s.judge_url else None
    work = estimate.Workload(s, config, size, judge_template(s), cuda, other)
    return estimate.plan_recompute(work, room)


def dry_run(s: Settings) -> None:
    machine, count = estimate.machines(s.dry_run, any_gpu=s.preset != "toy")
    if s.preset == "toy" and s.toy_tokens:
        recipe = Recipe(seed=s.seed, skills=toy_skills(s))
        config = model_config(recipe, make_tokenizer(Languages(s.seed), recipe.skills))
    else:
        config = estimate.find_config(s.model)
    work = workload(s, config, count, machine.is_gpu, 1e9 * machine.gigabytes)
    print(estimate.format_estimate(work, machine, s.model or "the toy"))
    if estimate.missing(work, machine) > 0:
        sys.exit(1)


def main(argv: list[str]) -> None:
    def start() -> None:
        s = parse(argv, __doc__)
        dry_run(s) if s.dry_run else run_training(s)

    run_with_error_reporting("ssr.py", start)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    main(sys.argv[1:])
