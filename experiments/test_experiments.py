"""test_experiments.py: the scripts beside this file, at their smallest.

    python -m pytest -q experiments/test_experiments.py
"""
import json
import math
import os
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import envs
import mem1
import ppo
import train
from experiments import (bench, bench_stages, compare, failures, gpu, gpu_speed, layouts, reading,
                         rewards)
from mem1 import ANSWER, END, ENC, IS, QUERY, TASK, Trajectory, demonstrate, keep_last, sample
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


def watched(monkeypatch):
    """A mock that knows what ppo.token_rewards() was given: reward, turn_ends, ..."""
    given = mock.Mock(side_effect=ppo.token_rewards)
    monkeypatch.setattr(ppo, "token_rewards", given)
    return given


def played(env, actions):
    """The trajectory of an episode in which the agent writes [(tag, text), ...]."""
    traj = Trajectory(env, [TASK])
    for tag, text in actions:
        traj.open_turn(keep_last)
        traj.close_turn([tag, *ENC.encode_ordinary(text), END])
    return traj


def test_only_the_tree_is_what_acted(run, capsys):
    found = printed(layouts.main, ["--episodes", 3, "--objectives", 2, 4], capsys)
    assert list(found) == ["tree", "stitched", "released"]
    for n in "2", "4":
        tree, stitched, released = (cells[n] for cells in found.values())
        assert list(tree) == ["mean_nats", "max_nats", "leak", "seconds", "tokens"]
        assert tree["leak"] == 0.0 < stitched["leak"]
        assert 1e-3 < stitched["mean_nats"] < released["mean_nats"]
        assert stitched["tokens"] == released["tokens"] < tree["tokens"]
    assert printed(layouts.main, [run, "--episodes", 3], capsys)["tree"]["16"]["max_nats"] < 1e-4


def test_rewards_are_what_their_names_say():
    env = envs.ComposedQA(4, hops=(2, 2), seed=1)
    (a, x), (b, y), (c, _), _ = env.golds
    facts = [path[0] for path in env.paths.values()]
    actions = [(QUERY, " ".join(fact.split()[:2])) for fact in [*facts[:3], facts[0]]]
    traj = played(env, [*actions, (ANSWER, f"{a} {x} {b} {y} indeed {c} {x[:2]}")])
    want = {"em": 1 / 4, "f1": (1 + 2 / 3) / 4, "partial": 2 / 4, "all": 0.0, "format": 1 / 4 + 0.2}
    for name, share in want.items():
        assert rewards.turn_rewards(name, traj) == pytest.approx([0.0] * 4 + [share])
    *on_the_way, again, last = rewards.turn_rewards("step", traj)
    assert min(on_the_way) >= 0.5 / 8 and again == 0.0 and last == 1 / 4  # found once, paid once

    traj = demonstrate(envs.ComposedQA(4, hops=(2, 2), seed=1), keep_last)
    assert rewards.turn_rewards("all", traj) == ppo.turn_rewards(traj)
    assert sum(rewards.turn_rewards("step", traj)) == pytest.approx(1.5)
    traj = played(envs.ComposedQA(1, seed=1, max_turns=1), [(QUERY, "x")])  # out of turns
    assert {name: rewards.turn_rewards(name, traj) for name in want} == dict.fromkeys(want, [0.0])


def test_a_turn_that_brings_facts_to_light_is_paid_at_its_own_last_token(monkeypatch):
    cfg = train.Config(device="cpu", ppo_batch=2, exercises=2, ppo_epochs=1, ppo_minibatches=1)
    trajs = [demonstrate(envs.ComposedQA(4, seed=i), keep_last) for i in range(2)]
    given = watched(monkeypatch)
    monkeypatch.setattr(ppo, "turn_rewards", lambda traj: rewards.turn_rewards("step", traj))
    monkeypatch.setattr(ppo, "rollout", lambda *args: trajs)
    model = GPT(GPTConfig(ENC.n_vocab, 1, 1, 8))
    ppo.update(model, torch.optim.AdamW(model.parameters()), model, [], keep_last, cfg, step=0)
    reward, turn_ends, *_ = given.call_args.args
    lengths = [len(turn.written) for traj in trajs for turn in traj.turns]
    assert turn_ends.nonzero()[:, 0].tolist() == (np.cumsum(lengths) - 1).tolist()
    assert reward.sum() == pytest.approx(3.0) and (reward > 0).sum() > 8


def test_the_judge_climbs_the_likelihood_of_the_preferences(run, monkeypatch):
    monkeypatch.setattr(rewards, "JUDGE_BATCH", 12)
    cfg, models = train.load_run(run)
    judge = train.load_model(models["mem1-demos"])
    judge.value_head.weight.data.normal_()
    trajs, first = rewards.preferences(judge, "mem1", cfg, step=0)
    assert [traj.prompt for traj in trajs[::2]] == [traj.prompt for traj in trajs[1::2]]
    alone = torch.stack([rewards.scores(judge, [traj])[0] for traj in trajs]).exp()
    better = alone[0::2].where(first, alone[1::2])
    likelihood = (better / (alone[0::2] + alone[1::2])).log().mean()  # Bradley and Terry's own form
    loss = -rewards.F.logsigmoid(rewards.margins(judge, trajs, first)).mean()
    (got,), (want,) = (torch.autograd.grad(x, judge.emb.weight) for x in (loss, -likelihood))
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_a_run_is_paid_as_it_was_told_to_and_compared_by_that(run, capsys, monkeypatch):
    given = watched(monkeypatch)
    monkeypatch.setattr(rewards, "JUDGE_STEPS", 2)
    monkeypatch.setattr("signal.signal", mock.Mock())
    for name in "all", "judge":
        monkeypatch.setattr(ppo, "turn_rewards", None)  # the script has to set it
        flags = ["--start", str(run), "--out", str(run.parent / name)]
        rewards.main(["--reward", name, *TINY, *flags])
        assert (given.call_args.args[0] > 0).any() == (name == "judge")  # all: nothing is right yet
    with pytest.raises(SystemExit, match="did not begin with that"):
        rewards.main(["--reward", "em", "--resume", "--out", str(run.parent / "judge")])

    path = run.parent / "judge" / "metrics.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    lines = [json.dumps({**row, "reward": reward}) for reward in [0.0, 1.0, 1.0, 1.0] * 4]
    path.write_text("\n".join(lines))  # 0.8 of the five that begin at the second
    groups = printed(compare.main, [run, run, run.parent / "all", path.parent], capsys)
    assert list(groups) == ["em", "all", "judge"] and len(groups["em"]["em@2"]) == 2
    assert groups["all"]["to 0.8"] == [None] and groups["judge"]["to 0.8"] == [6.0]


def test_lost_objectives_are_explained_by_the_first_mistake(run, capsys):
    failures.main([str(run), "--objectives", "2", "--episodes", "2"])
    assert "malformed" in capsys.readouterr().out  # it has learned nothing in two steps
    right, wrong = envs.ComposedQA(4, seed=1), envs.ComposedQA(4, seed=1)
    assert not failures.failures([demonstrate(right, keep_last)], keep_last)
    traj = demonstrate(wrong, keep_last, np.random.default_rng(1))
    (cause,) = failures.failures([traj], keep_last)
    assert cause.endswith("an entry")
    with pytest.raises(SystemExit, match="the run has"):
        failures.main([str(run), "--agents", "nobody"])


def test_wrong_words_of_exercises_are_counted(run, capsys):
    class Knows:  # what comes next, but never what follows a `;`
        def __call__(self, ids):
            following = ids.roll(-1, 1)
            following[ids == ENC.encode_ordinary(" ;")[0]] = END
            return torch.nn.functional.one_hot(following, ENC.n_vocab).float()  # (1, T, V)

        def logits(self, x):
            return x

    trajs = [mem1.exercise(train.Config(), 0, i, 9) for i in range(40)]
    for skill, (wrong, of) in reading.mistakes(Knows(), trajs).items():
        some = [traj.branches[0] for traj in trajs
                if ENC.decode(traj.branches[0].ids[:1]).strip() == skill]
        assert wrong == (len(some) if skill in ("edit", "append") else 0)  # which begin with `;`
        assert of == sum(sum(branch.loss_mask) for branch in some)
    reading.main([str(run), "--longest", "4", "--exercises", "7"])
    assert capsys.readouterr().out.split("\n")[1].startswith("primer           4  ")


def test_the_benchmark_measures_the_same_work_and_says_what_it_promises(capsys):
    found = printed(bench.main, ["--quick"], capsys)
    names = {"rollout_vs_nocache", "rollout_tok_s", "rollout_of_floor", "mfu", "env_share"}
    names |= {f"learner_vs_per_turn_{size}" for size in ("2", "16", "64x6", "160x16")}
    for agent in "mem1", "mem1_list", "full":
        names |= {f"cache_growth_{agent}", f"turn_growth_{agent}"}
    assert found.pop("rollout_vs_hf") is found.pop("update_vs_trl") is None
    assert {*found} == names | {"iteration_s"} and all(map(math.isfinite, found.values()))
    assert found["rollout_vs_nocache"] > 1 > found["mfu"] > 0 and 0 < found["env_share"] < 0.5


def test_what_is_to_be_measured_on_a_gpu_runs_on_a_cpu_and_finds_a_sampler_that_is_off(tmp_path):
    args = SimpleNamespace(device="cpu", quick=True)

    def largest():
        found = gpu.exact(args, tmp_path)
        assert len(found) == 8
        return [float(found[f"0.5M {name} float64"].split()[3][:-1]) for name in ("mem1", "full")]

    assert max(largest()) < 1e-12
    with mock.patch.object(mem1, "sample", lambda logits, uniform: sample(logits * 1.1, uniform)):
        assert min(largest()) > 1e-3
    assert float(gpu.ddp(args, tmp_path)["largest difference of a weight"]) < 1e-6
    for part in gpu_speed.sizes, gpu_speed.decoding, gpu_speed.iteration:
        assert all(part(args, tmp_path).values())


def test_a_stage_that_is_slower_in_another_checkout_is_found(tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(bench_stages.HERE, other, ignore=shutil.ignore_patterns("runs", ".*"))
    code = (other / "train.py").read_text()
    loop = "        row = imitate(stage.learner, stage.optimizer, batch, cfg)\n        if is_due"
    assert code.count(loop) == 1, "train_demos has changed"
    (other / "train.py").write_text(code.replace(loop, "        time.sleep(3)\n" + loop))
    bench_stages.main([str(other), "--quick", "--pairs", "1"])
    lines = capsys.readouterr().out.splitlines()
    times = {line.split()[0]: float(line.split()[-5]) for line in lines}
    assert list(times) == ["primer", "demos", "ppo"] and times["demos"] > 3 > times["primer"]
    with pytest.raises(SystemExit):
        bench_stages.main([str(tmp_path), "--quick"])


@pytest.mark.skipif(os.environ.get("PROFILE") != "thorough", reason="starts five interpreters")
def test_two_machines_under_torchrun_train_as_one_process(tmp_path):
    flags = "--preset debug --agents mem1 --primer-steps 8 --demos-steps 4 --device cpu".split()
    here = Path(__file__).resolve().parents[1]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    nodes = []
    for rank in "0", "1":
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank",
                   rank, "--master-addr", "127.0.0.1", "--master-port", port, "--nproc-per-node",
                   "1", "train.py", *flags, "--out", str(tmp_path / "two")]
        nodes.append(subprocess.Popen(command, cwd=here))
    assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    with mock.patch("signal.signal"):
        train.main([*flags, "--nproc", "1", "--out", str(tmp_path / "one")])
    one, two = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two"))
    rows = list(zip(map(json.loads, one.splitlines()), map(json.loads, two.splitlines())))
    assert len(rows) == 16
    for row, same in rows[:12]:  # PPO earns nothing in so short a run: its gradient is rounding
        assert same["loss"] == pytest.approx(row["loss"], rel=1e-4)
