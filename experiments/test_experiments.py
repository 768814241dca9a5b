"""test_experiments.py: the scripts beside this file, at their smallest, and more of the main code.

    python -m pytest -q experiments/test_experiments.py
"""
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import envs
import eval as evaluation
import mem1
import model
import ppo
import train
from experiments import gpu, gpu_speed, layouts, rewards, tables
from mem1 import ANSWER, END, ENC, QUERY, TASK, Trajectory, expert_rollout, keep_last, sample
from model import GPT, GPTConfig

TINY = ("--preset debug --device cpu --dtype float32 --nproc 1 --agents mem1 --primer-steps 2 "
        "--demos-steps 2 --ppo-steps 2 --ppo-batch 4 --valid-episodes 1 --eval-episodes 1 "
        "--eval-objectives 1 2").split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "em"
    with mock.patch("signal.signal"):  # Ctrl-C stays what it is
        train.main([*TINY, "--out", str(out)])
    return out


def printed(main, argv, capsys):
    """What a script prints with --json: one object, and nothing else."""
    capsys.readouterr()
    main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


def played(env, actions):
    """The trajectory of an episode in which the agent writes [(tag, text), ...]."""
    traj = Trajectory(env, [TASK])
    for tag, text in actions:
        traj.add_turn(traj.next_context(keep_last), [tag, *ENC.encode_ordinary(text), END])
    return traj


def test_only_the_exact_layout_agrees_with_the_sampler(run, capsys):
    found = printed(layouts.main, ["--episodes", 3, "--objectives", 2, 4], capsys)
    assert list(found) == ["exact", "stitched", "released"]
    for n in "2", "4":
        assert 1e-3 < found["stitched"][n]["mean_nats"] < found["released"][n]["mean_nats"]
    assert printed(layouts.main, [run, "--episodes", 3], capsys)["exact"]["16"]["max_nats"] < 1e-4


@pytest.mark.parametrize("name, plain, first", [
    ("stitched", True, 9), ("stitched", False, 2), ("released", False, 1)])  # 9: never
def test_layouts_differ_from_the_sampler_from_the_turn_on_that_is_documented(
        monkeypatch, name, plain, first):
    torch.manual_seed(0)
    net = GPT(GPTConfig(ENC.n_vocab, 1 if plain else 2, 2, 32)).double()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    if plain:  # all differences come from deeper layers, the convolution and the gates
        monkeypatch.setattr(model, "with_age", lambda q, k, clock: (q, k))
        net.blocks[0].taps.data[:-1] = 0.0
        net.blocks[0].taps.data[-1] = 1.0
    trajs = [expert_rollout(envs.ComposedQA(4, (2, 2), seed=i), keep_last) for i in range(3)]
    number = torch.tensor([t for traj in trajs for t, turn in enumerate(traj.turns)
                           for _ in turn.written])
    acted = layouts.learner_logp(net, "exact", trajs)
    off = (layouts.learner_logp(net, name, trajs) - acted).abs()
    assert off[number < first].max() < 1e-6
    assert all(off[number == t].max() > 1e-3 for t in range(first, number.max() + 1))


def test_ppo_under_a_layout_trains_on_its_log_probabilities(run, monkeypatch, capsys):
    monkeypatch.setattr("signal.signal", mock.Mock())
    for owner, name in (ppo, "rollout"), (ppo, "make_rows"), (ppo, "predict"), (train, "COMMAND"):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # which the script replaces
    out = run.parent / "stitched"
    longer = "--env qa --around 4 --start".split()  # with a history, so that layouts differ
    layouts.main(["--train", "stitched", *TINY, *longer, str(run), "--out", str(out)])
    assert "nats from the sampler" in capsys.readouterr().out and "stitched" in train.COMMAND
    with pytest.raises(SystemExit):
        layouts.main(["--json", "--train", "stitched"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and max(row["gap"] for row in rows) < 1e-4  # its own, not the sampler's


def test_every_step_has_the_learning_rate_of_its_stage(tmp_path, monkeypatch):
    rates = []

    def step(net, optimizer, grad_clip, real=ppo.clip_and_step):
        rates.append(optimizer.param_groups[0]["lr"])
        return real(net, optimizer, grad_clip)

    monkeypatch.setattr("signal.signal", mock.Mock())
    monkeypatch.setattr(ppo, "clip_and_step", step)
    train.main([*TINY, "--out", str(tmp_path / "run")])
    cfg = train.Config()  # two steps of each stage: by hand, with warmup over 50, 50 and 3
    per_step = cfg.ppo_epochs * cfg.ppo_minibatches
    want = [cfg.primer_lr / 50, cfg.primer_lr / 25, cfg.demos_lr / 50, cfg.demos_lr / 25]
    want += [cfg.ppo_lr / 3] * per_step + [cfg.ppo_lr * 2 / 3] * per_step
    assert rates == pytest.approx(want)


@pytest.mark.parametrize("scale", [1.0, float("inf")])
def test_only_a_finite_gradient_changes_a_weight(scale):
    net = torch.nn.Linear(2, 1)
    before, optimizer = net.weight.tolist(), torch.optim.SGD(net.parameters(), lr=1.0)
    (net.weight.sum() * scale).backward()
    with pytest.raises(FloatingPointError) if scale > 1 else contextlib.nullcontext():
        ppo.clip_and_step(net, optimizer, 1.0)
    assert (net.weight.tolist() == before) == (scale > 1)


def test_an_agent_is_measured_against_the_demonstrator(monkeypatch):
    good = expert_rollout(envs.ComposedQA(2, seed=1), keep_last)
    bad = Trajectory(envs.ComposedQA(2, seed=1), good.prompt)
    bad.add_turn(good.turns[0].context, good.turns[0].written)  # right
    bad.add_turn(good.turns[1].context, [END])  # malformed
    monkeypatch.setattr(evaluation, "play", lambda *args: [good, bad])
    found = evaluation.measure(None, keep_last, None, 2, 2, None)
    assert (found["right"], found["malformed"], found["em"]) == (0.75, 0.5, 1.0)


@pytest.mark.parametrize("agent", mem1.POLICIES)
def test_only_mem1_imitates_random_notes(agent):
    cfg, are_oracle = train.Config(), []
    for i in range(20):
        env = train.training_task(cfg, agent, envs.Stream.DEMOS, 0, i)
        oracle = expert_rollout(env, mem1.POLICIES[agent])
        are_oracle.append(train.demonstration(cfg, agent, 0, i).turns == oracle.turns)
    assert all(are_oracle) == (agent != "mem1")


def test_rewards_are_what_their_names_say():
    env = envs.ComposedQA(4, hops=(2, 2), seed=1)
    (a, x), (b, y), (c, _), _ = env.golds
    facts = [path[0] for path in env.paths.values()]
    actions = [(QUERY, " ".join(fact.split()[:2])) for fact in [*facts[:3], facts[0]]]
    traj = played(env, [*actions, (ANSWER, f"{a} {x} {b} {y} indeed {c} {x[:2]}")])
    want = {"em": 1 / 4, "all": 0.0, "format": 1 / 4 + 0.2}
    for name, share in want.items():
        assert rewards.turn_rewards(name, traj) == pytest.approx([0.0] * 4 + [share])
    *on_the_way, again, last = rewards.turn_rewards("step", traj)
    assert min(on_the_way) >= 0.5 / 8 and again == 0.0 and last == 1 / 4  # found once, paid once

    traj = expert_rollout(envs.ComposedQA(4, hops=(2, 2), seed=1), keep_last)
    assert rewards.turn_rewards("all", traj) == ppo.turn_rewards(traj)
    assert sum(rewards.turn_rewards("step", traj)) == pytest.approx(1.5)
    traj = played(envs.ComposedQA(1, seed=1, max_turns=1), [(QUERY, "x")])  # out of turns
    assert {name: rewards.turn_rewards(name, traj) for name in want} == dict.fromkeys(want, [0.0])


def test_a_turn_that_brings_facts_to_light_is_paid_at_its_own_last_token(monkeypatch):
    cfg = train.Config(device="cpu", ppo_batch=2, exercises=2, ppo_epochs=1, ppo_minibatches=1)
    trajs = [expert_rollout(envs.ComposedQA(4, seed=i), keep_last) for i in range(2)]
    given = mock.Mock(side_effect=ppo.token_rewards)
    monkeypatch.setattr(ppo, "token_rewards", given)
    monkeypatch.setattr(ppo, "turn_rewards", lambda traj: rewards.turn_rewards("step", traj))
    monkeypatch.setattr(ppo, "rollout", lambda *args: trajs)
    net = GPT(GPTConfig(ENC.n_vocab, 1, 1, 8))
    for traj in trajs:
        for turn in traj.turns:
            turn.logp = turn.value = [0.0] * len(turn.written)
    ppo.update(net, torch.optim.AdamW(net.parameters()), net, [], keep_last, cfg, step=0)
    reward, turn_ends, *_ = given.call_args.args
    lengths = [len(turn.written) for traj in trajs for turn in traj.turns]
    assert turn_ends.nonzero()[:, 0].tolist() == (np.cumsum(lengths) - 1).tolist()
    assert reward.sum() == pytest.approx(3.0) and (reward > 0).sum() > 8


def test_a_run_is_paid_as_it_was_told_to(run, monkeypatch):
    monkeypatch.setattr("signal.signal", mock.Mock())
    monkeypatch.setattr(ppo, "turn_rewards", None)  # the script has to set it, and this:
    monkeypatch.setattr(train, "COMMAND", None)
    out = run.parent / "all"
    rewards.main(["--reward", "all", *TINY, "--start", str(run), "--out", str(out)])
    assert ppo.turn_rewards.args == ("all",) and train.COMMAND.endswith("rewards.py --reward all")
    with pytest.raises(SystemExit, match="was not started with"):
        rewards.main(["--reward", "em", "--resume", "--out", str(out)])
    with pytest.raises(SystemExit, match="cannot be written"):
        rewards.main(["--reward", "em", "--start", str(run), *TINY, "--out", "/proc/run"])


def test_tables_put_runs_side_by_side_and_refuse_what_is_no_run(run, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    state = torch.load(again / "checkpoint.pt")
    state["config"].update(seed=1, demos="oracle")
    torch.save(state, again / "checkpoint.pt")
    one = printed(tables.main, [run, again], capsys)
    (tmp_path / "one.json").write_text(json.dumps(one))
    tables.main([str(tmp_path / "one.json")])
    assert "| mem1, after PPO | 1 |" in capsys.readouterr().out
    assert set(one["methods"]["mem1"]) == {"0"} and set(one["curves"]["mem1-oracle"]) == {"1"}
    found = printed(tables.main, [run, again, "--exposure"], capsys)["0"]
    assert found["mem1"]["1"] == found["mem1-random"]["0"] != {}
    assert "| L = 0, `mem1` | 1 |" in tables.exposure_table({"0": found})

    (tmp_path / "none.json").write_text("{}")
    (again / "results.json").unlink()
    torch.save({**state, "models": {}}, again / "checkpoint.pt")  # has just begun
    for bad in run / "results.json", tmp_path / "none.json", again, tmp_path, f"{run} {run}":
        with pytest.raises(SystemExit):
            tables.main(str(bad).split())
        assert capsys.readouterr().err.count("\n") == 1


def test_an_interval_is_of_the_t_distribution():
    assert tables.interval([1.0, 2.0, 3.0], ".2f") == "2.00 ± 2.48"  # 4.303 / sqrt(3)
    assert tables.interval([5.0], ".0f") == "5"


def test_a_comparison_is_paired_by_seed_and_divides_by_nothing_near_0():
    given = dict(a=dict(s0=10.0, s1=4.0, s2=9.0), b=dict(s1=2.0, s0=8.0), c=dict(s0=0.5))  # EM
    methods = {name: {seed: {"16": dict(em=em, peak=1.0, dependency=1.0)}
                      for seed, em in scores.items()} for name, scores in given.items()}
    assert "| 16 | +2.00 ± 0.00 | 1.62 ± 4.76 | 1.00 ± " in tables.comparison(methods, "a", "b")
    assert "| 16 | +9.50 |  | 1.00 |" in tables.comparison(methods, "a", "c")


def test_what_is_to_be_measured_on_a_gpu_runs_on_a_cpu_and_finds_a_sampler_that_is_off():
    args = SimpleNamespace(device="cpu", quick=True)

    def largest():
        found = gpu.exact(args)
        assert len(found) == 8
        return [float(found[f"0.5M {name} float64"].split()[3][:-1]) for name in ("mem1", "full")]

    assert max(largest()) < 1e-12
    with mock.patch.object(mem1, "sample", lambda logits, uniform: sample(logits * 1.1, uniform)):
        assert min(largest()) > 1e-3
    for part in gpu_speed.sizes, gpu_speed.decoding:
        assert part(args)


@pytest.mark.skipif(os.environ.get("PROFILE") != "thorough", reason="starts four interpreters")
def test_two_machines_under_torchrun_train_as_one_process(tmp_path):
    flags = "--preset debug --agents mem1 --primer-steps 8 --demos-steps 4 --device cpu".split()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    nodes = []
    for rank in "0", "1":
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank",
                   rank, "--master-addr", "127.0.0.1", "--master-port", port, "--nproc-per-node",
                   "1", "train.py", *flags, "--out", str(tmp_path / "two")]
        nodes.append(subprocess.Popen(command, cwd=ROOT))
    assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    with mock.patch("signal.signal"):
        train.main([*flags, "--nproc", "1", "--out", str(tmp_path / "one")])
    one, two = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two"))
    rows = list(zip(map(json.loads, one.splitlines()), map(json.loads, two.splitlines())))
    assert len(rows) == 8 + 4 + 20  # primer, demos, PPO
    for row, same in rows[:12]:  # PPO earns nothing in so short a run: its gradient is rounding
        assert same["loss"] == pytest.approx(row["loss"], rel=1e-4)


def test_every_link_between_the_documents_leads_to_a_file_and_a_heading():
    anchors = {}
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        heads = re.findall(r"^#+ (.*)", path.read_text(), re.M)
        anchors[path] = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    links = [(path, link) for path in anchors
             for link in re.findall(r"\]\((?!http)([^)]*)\)", path.read_text())]
    assert len(links) > 40 and any("#" in link for _, link in links)
    for path, link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists() and (not anchor or anchor in anchors[target]), (path, link)
