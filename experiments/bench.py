"""bench.py: how fast everything is, on one core.

    python experiments/bench.py            # some minutes
    python experiments/bench.py --peers    # also against transformers and trl (bench_peers.py)
    python experiments/bench.py --json     # one JSON object on stdout; the text goes to stderr
    python experiments/bench.py --quick    # smallest sizes: does it run? Its figures are noise

What is compared takes turns, and is asserted to be the same work (bench_work.py). It measures, by
the CPU time of this process:

    rollout_vs_nocache       time of sampling without a key-value cache, over ours
    rollout_tok_s            tokens sampled in a second
    rollout_of_floor         time of its matrix products and memory traffic alone, over a rollout's
    learner_vs_per_turn_N    time of a forward and backward pass with a sequence for each turn, over
                             ours, at 2 and 16 objectives; PxJ: J long turns, prompts of P tokens
    mfu                      share of the peak of large matrix products that the learner reaches
    env_share, iteration_s   of a PPO iteration: share of environments, rows, Python; its seconds
    cache_growth_AGENT       key-value memory beside the prompt, at 64 objectives over that at 2
    turn_growth_AGENT        time of a late turn over that of an early one, at 64 objectives
    rollout_vs_hf            time of sampling by transformers over ours; null without --peers
    update_vs_trl            time of a PPO iteration by TRL over ours; null without --peers

AGENT is `mem1` on tasks that count (count.py), where its state need not grow, and `mem1_list` and
`full` on tasks whose answers are all to be listed.
"""
import argparse
import collections
import contextlib
import json
import math
import os
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import envs
import mem1
import ppo
import train
from envs import Stream
from experiments.bench_work import (TURNS, WRITTEN, Endless, Lines, act_out, by_turns, clock,
                                    compare, copy_bandwidth, gemm_peak, least_seconds, metronomes,
                                    recite)
from mem1 import (ENC, Branch, demonstrate, keep_all, keep_last, make_rows, predict, recall,
                  rollout, sample)
from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------
# Sampling


def bench_rollout(endless, episodes, pairs):
    """Against sampling without a cache, and against what the machine would allow."""
    def ours():
        return rollout(endless, *metronomes(episodes, 2))

    def slow():
        return by_turns(*metronomes(episodes, 2), partial(encode_anew, endless))

    assert texts(ours()) == texts(slow()), "with a cache and without, the same must be written"
    text = f"{episodes} episodes of 2 turns, the same tokens"
    ratio, _ = compare("rollout_vs_nocache", slow, ours, pairs, text)
    trajs = rollout(endless, *metronomes(episodes))
    took = least_seconds(lambda: rollout(endless, *metronomes(episodes)))
    speed, share = episodes * TURNS * WRITTEN / took, floor(trajs, endless) / took
    print(f"rollout: {speed:.0f} tokens/s, {share:.0%} of what products and memory traffic allow")
    return dict(rollout_vs_nocache=ratio, rollout_tok_s=speed, rollout_of_floor=share)


@torch.no_grad()
def encode_anew(model, contexts, uniform):
    """A turn without a cache: everything is encoded again for each token."""
    for drawn in uniform.T:
        x = model(contexts)[:, -1]  # (B, C)
        ids, _ = sample(model.logits(x), drawn)  # (B,)
        contexts = torch.cat([contexts, ids[:, None]], 1)  # (B, L+1)
    return contexts[:, -uniform.size(1) :]


def texts(trajs):
    return [[turn.written for turn in traj.turns] for traj in trajs]


def floor(trajs, model):
    """Seconds that a rollout would take if it were products at their peak and reading at full
    bandwidth, and nothing else."""
    C, nl = model.config.n_embd, model.config.n_layer
    weights = sum(p.numel() for p in model.blocks.parameters()) + model.emb.weight.numel()
    encoded = read = 0  # tokens, each prompt once; keys that decoding looks at
    for traj in trajs:
        encoded += len(traj.prompt) + sum(len(branch.ids) for branch in traj.branches)
        for seen, wrote in traj.spans:
            read += wrote * (len(traj.prompt) + seen) + wrote * (wrote - 1) // 2
    steps = max(sum(wrote for _, wrote in traj.spans) for traj in trajs)
    products = (2 * weights * encoded + 4 * nl * C * read) / gemm_peak()
    return products + (4 * weights * steps + 8 * nl * C * read) / copy_bandwidth()


# ----------------------------------------------------------------------------------------------
# Learning


def bench_learner(model, endless, cfg, pairs):
    """Forward and backward passes over whole episodes: of our own tasks, and of tasks and states as
    long as plain words would make them."""
    acted = {}
    for n in 2, 16:
        acted[f"{n}"], _ = act_out(model, cfg, n, cfg.ppo_batch * 2 // n + 1, keep_last)
    for turns, written, prompt in (6, 24, 64), (16, 48, 160):
        episodes = metronomes(cfg.ppo_batch * 4 // turns + 1, turns, written, prompt)
        acted[f"{prompt}x{turns}"] = rollout(endless, *episodes)

    found, shares = {}, {}
    for size, trajs in acted.items():
        name = f"learner_vs_per_turn_{size}"
        ours = partial(learn, model, trajs, cfg.micro_batch)
        views = [a_row_a_turn(traj) for traj in trajs]
        theirs = partial(learn, model, views, cfg.micro_batch)
        assert abs(ours() / theirs() - 1) < 1e-4, "both must be the same loss"
        text = f"{len(lengths(views))} turns in {len(lengths(trajs))} rows"
        found[name], seconds = compare(name, theirs, ours, pairs, text)
        least = seconds[:, 1].min()
        shares[size] = flops(model, trajs) / least / gemm_peak()
        print(f"{'':26s} ours: {sum(lengths(trajs)) / least:.0f} tokens/s, "
              f"{shares[size]:.0%} of the peak of products")
    return dict(found, mfu=max(shares["2"], shares["16"]))


def learn(model, trajs, budget):
    """A forward and a backward pass. Returns the sum of log-probabilities."""
    total = 0.0
    for rows in make_rows(trajs, budget):
        logp, value, _ = predict(model, rows)  # (m,), (m,)
        (logp.sum() + value.sum()).backward()
        total += logp.sum().item()
    model.zero_grad()
    return total


def a_row_a_turn(traj):
    """One sequence for each turn, as many train: the prompt, what was kept, and what was written.

    Ours is one for each branch. Of MEM1 the first two turns share one: there is little difference.
    """
    branches = []
    for t, turn in enumerate(traj.turns):
        kept = recall(traj.env, keep_last, traj.turns[:t])
        branch = Branch()
        branch.extend(kept + turn.state[:1], loss_mask=False)  # its <IS> is given
        branch.extend(turn.written, loss_mask=True)
        branches.append(branch)
    return replace(traj, branches=branches)


def lengths(trajs):
    """Tokens of each of the learner's rows, padding not counted."""
    return [len(traj.prompt) + len(branch.ids) for traj in trajs for branch in traj.branches]


def flops(model, trajs):
    """Floating point operations of learn(), padding not counted (6 N + attention)."""
    C, nl = model.config.n_embd, model.config.n_layer
    forward = 2 * sum(p.numel() for p in model.blocks.parameters()) * sum(lengths(trajs))
    forward += 4 * nl * C * sum(n * (n + 1) // 2 for n in lengths(trajs))
    forward += 2 * C * model.config.vocab_size * sum(traj.n_trained for traj in trajs)
    return 3 * forward


# ----------------------------------------------------------------------------------------------
# A PPO iteration


def bench_iteration(model, cfg, n):
    """Where the time of n iterations goes. The model writes what the demonstrator would."""
    reference = GPT(model.config).to(cfg.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    spent = collections.Counter()

    def timed(name, function):
        def wrapped(*args, **kwargs):
            started = clock(cfg.device)
            result = function(*args, **kwargs)
            spent[name] += clock(cfg.device) - started
            return result
        return wrapped

    def make():
        tasks = range(cfg.ppo_batch)
        return [train.training_task(cfg, "mem1", Stream.PPO, 0, i) for i in tasks]

    def act(model, environments, policy, rngs, batch):
        return rollout(model, environments, policy, [Lines(t) for t in scripts], batch)

    scripts = [demonstrate(env, keep_last).turns for env in make()]
    make = timed("make", make)
    within = dict(sample=recite, feed=timed("sample", mem1.feed), write=timed("sample", mem1.write))
    parts = dict(rollout=timed("act", act), optimizer_step=timed("learn", ppo.optimizer_step))
    for name in "make_rows", "exercises":
        parts[name] = timed("make", getattr(ppo, name))
    with mock.patch.multiple(mem1, **within), mock.patch.multiple(ppo, **parts):
        for i in range(n + 1):
            if i == 1:  # the first was to warm up
                spent.clear()
                started = clock(cfg.device)
            ppo.update(model, optimizer, reference, make(), keep_last, cfg, 0)
        whole = clock(cfg.device) - started

    env = spent["act"] - spent["sample"] + spent["make"]
    rest = whole - spent["act"] - spent["make"] - spent["learn"]
    print(f"a PPO iteration of {cfg.ppo_batch} episodes: {whole / n:.2f} s: sampling "
          f"{spent['sample'] / whole:.0%}, forward, backward, step {spent['learn'] / whole:.0%}, "
          f"environments, rows, Python {env / whole:.0%}, reference, advantages {rest / whole:.0%}")
    return dict(env_share=env / whole, iteration_s=whole / n)


# ----------------------------------------------------------------------------------------------
# Over the horizon


def bench_horizon(cfg, horizons):
    """Memory, and time of a turn of eight episodes side by side."""
    print(f"{'tasks':5s} {'agent':5s} {'N':>3s} {'KB of cache beside the prompt':>30s} "
          f"{'MB of memory at peak':>21s} {'ms a turn, early':>17s} {'late':>6s}")
    found = {}
    for env, agent, policy in [("count", "mem1", keep_last), ("qa", "mem1_list", keep_last),
                               ("qa", "full", keep_all)]:
        tasks = replace(cfg, env=env)
        ENC.add(envs.extra_words(tasks))
        model = GPT(GPTConfig(ENC.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd))
        token = 2 * 4 * cfg.n_layer * cfg.n_embd  # bytes of its keys and values
        beside, early, late = [], [], []
        for n in horizons:
            peak_memory(reset=True)
            trajs, seconds = act_out(model, tasks, n, 8, policy)
            prompt = max(len(traj.prompt) for traj in trajs)
            beside.append(trajs[0].kv_bytes - token * prompt)
            shown = min(len(traj.turns) for traj in trajs)  # turns in which all play
            third = shown // 3 + 1
            early.append(float(np.median(seconds[1 : 1 + third])))
            late.append(float(np.median(seconds[shown - third : shown])))
            print(f"{env:5s} {agent[:4]:5s} {n:3d} {beside[-1] / 1e3:30.0f} {peak_memory():21.0f} "
                  f"{early[-1] * 1e3:17.1f} {late[-1] * 1e3:6.1f}")
        found[f"cache_growth_{agent}"] = beside[-1] / beside[0]
        found[f"turn_growth_{agent}"] = late[-1] / early[-1]
    return found


def peak_memory(reset=False):
    """Most memory in use (MB) since the last reset; nan where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    except OSError:
        return math.nan


def bench(quick, peers):
    """All measurements: {name: number}."""
    torch.manual_seed(0)
    cfg = train.Config(device="cpu", dtype="float32", ppo_batch=4 if quick else 64)
    pairs = 1 if quick else 5
    config = GPTConfig(ENC.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd)
    model, endless = GPT(config), Endless(config)
    print(f"one core: {gemm_peak() / 1e9:.0f} GFLOP/s in a product of 1024 x 1024, "
          f"{copy_bandwidth() / 1e9:.1f} GB/s in a copy; load before: {os.getloadavg()[0]:.1f}")
    found = dict(rollout_vs_hf=None, update_vs_trl=None)
    found.update(bench_rollout(endless, cfg.ppo_batch, pairs))
    found.update(bench_learner(model, endless, cfg, pairs))
    found.update(bench_iteration(model, cfg, 1 if quick else 3))
    found.update(bench_horizon(cfg, (2, 4) if quick else (2, 4, 8, 16, 32, 64)))
    if peers:
        from experiments import bench_peers
        found.update(bench_peers.bench(endless, cfg, pairs))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest sizes")
    parser.add_argument("--peers", action="store_true", help="also against transformers and trl")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        found = bench(args.quick, args.peers)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
