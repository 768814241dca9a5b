"""bench_work.py: what bench.py and bench_peers.py time: work of known size, and how it is timed.

No trained agent is needed: random weights either write as much as they may, or they are made to
write what the demonstrator would have written, so that all lengths are those of a trained agent.
"""
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import envs
import mem1
from envs import Stream
from mem1 import (END, ENC, Trajectory, demonstrate, keep_last, prompt_ids, rollout, sample,
                  turn_cap)
from model import GPT

GIVEN, WRITTEN, TURNS = 24, 24, 6  # tokens read and written in a turn of a Metronome; its turns


class Metronome:
    """An environment that takes any text, and answers with 24 tokens: nothing is left to chance."""
    em = 0

    def __init__(self, turns=TURNS, written=WRITTEN, prompt=64):
        self.left = turns
        self.done = False
        self.prompt = " jelo" * (prompt - 1)
        self.paths, self.history = {}, []
        self.width = 0  # no task: just the cap
        self.n_objectives = self.n_questions = written - 16
        assert turn_cap(self) == written, "nothing but the cap may end a turn"

    def step(self, kind, text):
        self.left -= 1
        self.done = self.left == 0
        return " jelo" * (GIVEN - 1)


class Endless(GPT):
    """A model that never ends a turn, so that all turns are as long as they may be."""

    def logits(self, x):
        logits = super().logits(x)  # (..., V)
        logits[..., END] = -1e9
        return logits


def metronomes(episodes, *size):
    """The arguments of rollout() for that many Metronome episodes."""
    rngs = [np.random.default_rng(i) for i in range(episodes)]
    return [Metronome(*size) for _ in range(episodes)], keep_last, rngs


def by_turns(environments, policy, rngs, write_turn):
    """Episodes of equal length, of which write_turn(contexts (B, L), uniform (B, n)) -> ids (B, n)
    writes the turns. Nothing is kept from one turn to the next."""
    trajs = [Trajectory(env, prompt_ids(env)) for env in environments]
    while not trajs[0].env.done:
        contexts, draws = [], []
        for traj, rng in zip(trajs, rngs):
            traj.open_turn(policy)
            contexts.append(traj.prompt + traj.branches[-1].ids)
            draws.append(1 - rng.random(turn_cap(traj.env)))
        uniform = torch.tensor(np.array(draws), dtype=torch.float32)  # (B, n)
        for traj, ids in zip(trajs, write_turn(torch.tensor(contexts), uniform).tolist()):
            traj.close_turn(ids)
    return trajs


# ----------------------------------------------------------------------------------------------
# Random weights that write what the demonstrator would


class Lines:
    """In place of a random generator: its numbers are what an agent is to write, a turn a call."""

    def __init__(self, turns):
        self.turns = iter(turns)

    def random(self, cap):
        ids = next(self.turns).written
        return 1 - (np.pad(ids, (0, cap - len(ids))) + 0.5) / ENC.n_vocab


def recite(logits, uniform):
    """mem1.sample() with Lines: it does its work, and then takes the token that the number says."""
    sample(logits, uniform)
    ids = (uniform * ENC.n_vocab).long()  # (B,)
    return ids, logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


def act_out(model, cfg, n, episodes, policy):
    """Episodes of n objectives: (trajectories, seconds of each turn of all of them together)."""
    starts = []  # of the prompts, and of each turn

    def feed(*args, feed=mem1.feed):
        starts.append(time.process_time())
        return feed(*args)

    keys = [[0, Stream.TEST, n, i, 0] for i in range(episodes)]
    lines = [Lines(demonstrate(envs.make_env(cfg, n, key), policy).turns) for key in keys]
    with mock.patch.multiple(mem1, sample=recite, feed=feed):
        trajs = rollout(model, [envs.make_env(cfg, n, key) for key in keys], policy, lines)
    assert all(traj.env.em == n for traj in trajs), "the demonstrator was not repeated"
    return trajs, np.diff([*starts[1:], time.process_time()])


# ----------------------------------------------------------------------------------------------
# Time


def clock(device="cpu"):
    """Seconds: CPU time of this process, since others may run beside it; on a GPU, wall time once
    all queued work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds_of(work, device="cpu"):
    started = clock(device)
    work()
    return clock(device) - started


def least_seconds(work, device="cpu", times=5):
    """The least of several timings; on a GPU, after a warm-up."""
    if device == "cuda":
        work()
    return min(seconds_of(work, device) for _ in range(times))


def gemm_peak():
    """Floating point operations a second in the product of two large matrices."""
    a, b = torch.randn(2, 1024, 1024)
    return 2 * 1024**3 / least_seconds(lambda: a @ b)


def copy_bandwidth():
    """Bytes a second, read and written, in a copy of 64 MiB."""
    a, b = torch.randn(2, 2**24)
    return 2 * 4 * len(a) / least_seconds(lambda: a.copy_(b))


def compare(name, theirs, ours, pairs, text, device="cpu"):
    """Both take turns. Prints the median ratio of the times of theirs and ours, with its range, and
    returns it, and the times (pairs, 2)."""
    seconds = []
    for _ in range(pairs + 1):
        seconds.append((seconds_of(theirs, device), seconds_of(ours, device)))
    seconds = np.array(seconds[1:])  # the first was to warm up
    ratios = seconds[:, 0] / seconds[:, 1]
    print(f"{name:26s} {np.median(ratios):6.2f} times   ({ratios.min():.2f} to {ratios.max():.2f}, "
          f"{pairs} pairs)   {text}")
    return float(np.median(ratios)), seconds
