"""train.py: teach a small GPT to work in constant memory: reading, imitation, reinforcement.

    python train.py                              # laptop: both agents, then the trend of the paper
    python train.py --preset debug               # smoke run, under a minute
    python train.py --device cuda --nproc 8      # 8 GPUs by DDP
    torchrun --nproc_per_node 8 train.py         # the same; also over several nodes (README: running at scale)
    python train.py --out runs/cpu --resume      # go on with an interrupted run
    python train.py --start runs/cpu --seed 1 --out runs/again   # another PPO from the imitated agents of a run
    python train.py --sweep                      # all agents from 3 seeds, the README's tables and figures: hours

Three stages. Qwen2.5-7B, which the paper starts from, can read; random weights can not, hence the first:
    primer   copying, editing, looking up, on random words. No environment. Shared by all agents
    demos    imitation of a forgetful demonstrator on few objectives: the format, and how to search
    ppo      reward: what to remember
(With `--reward judge` a stage before ppo: a judge learns from noisy preferences between two episodes; it is what pays then.)
The agent `mem1` prunes its context, the agent `full` keeps everything; only the context policy differs
(`--agents` trains others: window, notes, amnesic, separate; all start from the same primer).

Every random choice is keyed by (seed, stage, step, episode): see `rng`. So a resumed run repeats an
uninterrupted one, and any number of processes plays the same episodes.

Exit codes: 0 finished, 2 bad input, 3 no checkpoint that is whole, 4 gradients not finite, 5 can not write, 6 a process
died or hung, 130 and 143 stopped by SIGINT and SIGTERM, 1 anything else. After 5, 6, 130 and 143 `--resume` goes on.
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import inspect
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import envs
import eval as evaluation
import ppo
from mem1 import ENC, LAYOUTS, POLICIES, Branch, Trajectory, demonstrate, evaluate, full, mem1, pack, recorded, rollout
from model import GPT, GPTConfig, save, write_atomically


@dataclass
class Config:
    # run
    preset: str = "cpu"  # debug, cpu, gpu or paper: sets several of the below at once
    out: str = "runs/cpu"  # the run's directory, runs/PRESET unless given
    resume: bool = False  # go on from the last checkpoint in it
    seed: int = 0  # of everything
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one
    nproc: int = 0  # processes; 0: one a GPU, or one a CPU core (at most 4)
    threads: int = 1  # torch threads a process: more of them fight over small matrices
    timeout: int = 45  # seconds that a process waits for the others in a training step before it gives them up
    dtype: str = "auto"  # of matrix products: float32, bfloat16, or auto: bfloat16 on a GPU
    compile: bool = False  # torch.compile the layers: costs minutes at first, meant for large models on a GPU
    agents: tuple = ("mem1", "full")  # context policies to train an agent for, one after the other
    start: str = ""  # a run whose imitated agents to take: then there is PPO only
    sweep: int = 0  # train every agent, and full context with twice the weights, from so many seeds; nproc runs side by side
    assets: str = "assets"  # where a sweep puts its results and figures
    # world
    env: str = "qa"  # qa: a world invented for each episode; web: one corpus of prose for all, with an unreliable search; dialogue: the user changes his mind; shop
    objectives: tuple = (1, 4)  # fewest and most in training
    hops: tuple = (1, 2)  # fewest and most relations in a question
    kinds: tuple = ("list",)  # of tasks: list, independent questions; chain, some about earlier answers; count and compare, one word answers all
    facts: str = ""  # a file of facts to ask about (TSV or JSONL: subject, relation, object), instead of an invented world
    skip_bad_facts: bool = False  # pass over its bad lines instead of stopping there
    names: int = 200  # of which an invented world is made; those beyond 200 are spelled letter by letter, several tokens each
    distractors: int = 2  # facts on the same subject that are not asked for
    top_k: int = 3  # facts a search returns
    # model
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 96
    # primer
    primer_steps: int = 800
    primer_batch: int = 64  # exercises a step
    primer_lr: float = 3e-3
    primer_longest: int = 32  # items in a list, reached after 60% of the steps
    # demos
    demos_steps: int = 900
    demos_batch: int = 32  # episodes a step
    demos_primer: int = 16  # exercises beside them, or reading skills erode
    demos_lr: float = 2e-3
    forget: float = 0.6  # share of demonstrations in which no answer is remembered
    hurry: float = 0.3  # share of demonstrations with too few turns, and share with more than enough
    # ppo
    ppo_steps: int = 112
    ppo_batch: int = 64  # episodes a step
    ppo_epochs: int = 2
    ppo_minibatches: int = 2
    ppo_primer: int = 16  # exercises beside each minibatch, or reading skills erode
    primer_coef: float = 0.3  # their weight
    ppo_lr: float = 2e-4
    layout: str = "tree"  # how PPO sees what mem1 did: tree, stitched or released (mem1.py: the last two are not exact)
    reward: str = "em"  # em, f1, partial: share of the questions answered so; all: all or nothing; step: for needed facts found too; format; judge
    judge_steps: int = 60
    judge_batch: int = 64  # episodes a step, two of each task
    judge_lr: float = 3e-4
    clip: float = 0.2  # of the ratio, and of the value's move
    kl_coef: float = 0.02  # price of leaving the demos policy, nats a token
    value_coef: float = 0.1  # weight of the value loss: the trunk is shared
    gamma: float = 1.0
    lam: float = 1.0
    # both
    grad_clip: float = 1.0
    weight_decay: float = 0.01
    pack_tokens: int = 1024  # tokens a forward pass: what stays in a CPU core's cache; on a GPU more
    # evaluation
    eval_every: int = 28  # ppo steps between looks at 2 and 16 objectives; also between checkpoints
    eval_objectives: tuple = (1, 2, 4, 8, 16, 32)  # horizons of the final table
    eval_episodes: int = 256  # a cell of the final table
    valid_episodes: int = 64  # a look


PRESETS = {
    "cpu": {},
    "debug": dict(out="runs/debug", nproc=1, n_layer=2, n_embd=48, n_head=2, primer_steps=40, primer_longest=4, demos_steps=40,
                  demos_batch=8, demos_primer=8, ppo_primer=4, judge_steps=4, judge_batch=8, ppo_steps=4, ppo_batch=8, eval_every=2, objectives=(1, 2),
                  eval_objectives=(1, 2, 4), eval_episodes=8, valid_episodes=4),
    "gpu": dict(out="runs/gpu", n_layer=8, n_embd=512, n_head=8, names=1000, objectives=(1, 8), distractors=4, top_k=5,
                eval_objectives=(1, 2, 4, 8, 16, 32, 64), primer_steps=4000, primer_batch=1024, primer_lr=1e-3,
                demos_steps=4000, demos_batch=512, demos_primer=512, demos_lr=5e-4, ppo_steps=400, ppo_batch=1024,
                ppo_primer=256, ppo_lr=1e-4, pack_tokens=65536, eval_episodes=1024, valid_episodes=256),
}
# The paper's own numbers (train_ppo.sh of its release), on a model of GPT-2's size: for comparison, not because random weights learn well at 1e-6.
PRESETS["paper"] = {**PRESETS["gpu"], **dict(
    out="runs/paper", n_layer=12, n_embd=768, n_head=12, objectives=(2, 2), ppo_steps=500, ppo_batch=128, ppo_minibatches=2, ppo_epochs=1,
    ppo_primer=0, ppo_lr=1e-6, clip=0.2, kl_coef=0.001, gamma=1.0, lam=1.0, grad_clip=1.0, weight_decay=0.01,
    eval_every=20, eval_objectives=(1, 2, 3, 4, 6, 8, 16), eval_episodes=1000)}

# ----------------------------------------------------------------------------------------------
# Randomness, and the data of each stage

PRIMER, DEMOS, PPO, JUDGE = 0, 1, 2, 5  # second entry of a key; eval.VALID and eval.TEST are the others


def rng(seed, stage, step, episode, what=0):
    """The generator of one thing: its stream depends on nothing but its key."""
    return np.random.default_rng([seed, stage, step, episode, what])


def world(cfg, seed, stage, step, episode, n_objectives=None, **kwargs):
    """The environment of one training or validation episode; its number of objectives drawn if not given."""
    n = n_objectives or int(rng(seed, stage, step, episode, 1).integers(cfg.objectives[0], cfg.objectives[1] + 1))
    return envs.make(cfg, n, [seed, stage, step, episode, 0], **kwargs)


def exercise(cfg, step, i, longest):
    """One reading exercise, as a trajectory of one branch of which the answers are trained."""
    text, answer = envs.primer(rng(cfg.seed, PRIMER, step, i), longest, [*envs.words_of(cfg), *envs.spelled(cfg)], cfg.kinds)
    branch = Branch()
    for words, learn in answer:
        branch.extend(ENC.encode_ordinary(words), trained=learn)
    return Trajectory(None, ENC.encode_ordinary(text), [branch])


def demonstration(cfg, agent, step, i, longest, most_turns):
    """One episode of the demonstrator, its turn budget too small in some, more than enough in others.

    So that it is seen what to do when the turns run out, and every number of turns that an agent may
    be told on a long horizon, up to `most_turns`. Positions are a random increasing subset of 0..L-1, L drawn between the
    episode's own depth (positions as when acting) and `longest`: spread so thin, a short training
    episode has seen the distances of long ones ("randomised positions", arXiv 2305.16843).
    """
    draw = rng(cfg.seed, DEMOS, step, i, 2)
    env = world(cfg, cfg.seed, DEMOS, step, i)
    enough, kind = env.max_turns, draw.random()
    if kind < cfg.hurry:
        env = world(cfg, cfg.seed, DEMOS, step, i, max_turns=int(draw.integers(2, enough)))
    elif kind < 2 * cfg.hurry:
        env = world(cfg, cfg.seed, DEMOS, step, i, max_turns=int(draw.integers(enough, max(enough, most_turns) + 1)))
    traj = demonstrate(env, POLICIES[agent], amnesic=draw.random() < cfg.forget)
    depth = len(traj.task) + max(len(branch.ids) for branch in traj.branches)
    traj.positions = np.sort(draw.choice(draw.integers(depth, max(longest, depth) + 1), depth, replace=False))
    return traj


# ----------------------------------------------------------------------------------------------
# Distribution: one process a device, each with its share of the episodes


class Learner(nn.Module):
    """mem1.evaluate as a module, for DDP to wrap."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return evaluate(self.model, batch)


def distribute(model, cfg, world_size):
    """The Learner of a model, by DDP if there are several processes."""
    learner = Learner(model)
    if world_size > 1:
        learner = nn.parallel.DistributedDataParallel(learner)
        # After its first backward pass DDP orders what it sums anew. Let that be over: a resumed run must not sum in another order.
        for batch in pack([exercise(cfg, 0, 0, 2)], cfg.pack_tokens):
            sum(0.0 * x.sum() for x in learner(batch.to(cfg.device))).backward()
    return learner


def total(tensor):
    """Sum over all processes, each of which must call this. In place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def most(tensor):
    """Maximum over all processes, each of which must call this. In place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def optimise(learner, optimiser, cfg, work):
    """One optimiser step on `work` [(pack, loss of (pack, logp, value, entropy)), ...], summed over all processes.

    Returns the gradient's norm. Gradients meet in the last backward pass only. DDP takes their mean, hence
    the factor. A loss or gradient that is not finite in one process makes all skip the step together, and the
    norm nan.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    optimiser.zero_grad(set_to_none=True)
    summed = torch.zeros(1, device=cfg.device)
    for k, (batch, loss) in enumerate(work):
        batch = batch.to(cfg.device)
        with learner.no_sync() if world_size > 1 and k < len(work) - 1 else contextlib.nullcontext():
            value = loss(batch, *learner(batch))
            (value * world_size).backward()
        summed += value.detach()
    norm = nn.utils.clip_grad_norm_(learner.parameters(), cfg.grad_clip)
    norm = (norm + 0.0 * total(summed)).item()  # nan if any loss is not finite
    if np.isfinite(norm):
        optimiser.step()
    return norm


def count(packs, cfg):
    """Trained tokens in the packs of all processes: what a sum of losses is divided by."""
    return total(torch.tensor(float(sum(len(p.target) for p in packs)), device=cfg.device))


def schedule(step, steps, warmup):
    """Learning rate factor: `warmup` steps up, constant, linear to 5% over the last 40%."""
    return min(1.0, (step + 1) / warmup, max(0.05, (steps - step) / (0.4 * steps)))


# ----------------------------------------------------------------------------------------------
# One step of each kind. Returns what to log


def imitate(cfg, learner, optimiser, agent, step, rank, world_size, needs):
    """Maximum likelihood of exercises (agent None) or of demonstrations with some exercises beside them. needs: see farthest_needs()."""
    exercises = cfg.demos_primer if agent else cfg.primer_batch
    ramp = 1.0 if agent else min(1.0, step / (0.6 * cfg.primer_steps))
    length = round(2 + ramp * (cfg.primer_longest - 2))
    key = step + (cfg.primer_steps if agent else 0)  # the exercises go on, they do not start again
    trajs = [exercise(cfg, key, i, length) for i in range(rank, exercises, world_size)]
    if agent:
        trajs += [demonstration(cfg, agent, step, i, *needs) for i in range(rank, cfg.demos_batch, world_size)]
    packs = pack(trajs, cfg.pack_tokens)
    n = count(packs, cfg)
    # The critic learns from the demonstrator's returns, so that PPO starts with one (value pretraining, arXiv
    # 2503.01491). Exercises earn nothing; weight 0 rather than none, since DDP waits for the value head's gradient.
    ret = torch.tensor(np.concatenate([returns(traj, cfg) for traj in trajs], dtype=np.float32), device=cfg.device)  # (M,)
    weight = torch.tensor([cfg.value_coef * bool(traj.env) for traj in trajs for _ in range(traj.n_trained)], device=cfg.device)  # (M,)
    summed = torch.zeros(1, device=cfg.device)

    def losses(batch, logp, value, entropy):
        summed.sub_(logp.detach().sum())
        return (-logp + weight[batch.index] * 0.5 * (value - ret[batch.index]) ** 2).sum() / n

    norm = optimise(learner, optimiser, cfg, [(p, losses) for p in packs])
    return dict(loss=(total(summed) / n).item(), norm=norm, skipped=int(not np.isfinite(norm)), tokens=int(n))


def returns(traj, cfg):
    """What is still to be earned in an episode, at each token that the agent wrote (M,), not discounted; none in an exercise."""
    if not traj.env:
        return np.zeros(traj.n_trained)
    to_go = np.cumsum(traj.rewards(cfg.reward)[::-1])[::-1]  # (J,)
    return np.repeat(to_go, [len(turn.written) for turn in traj.turns])


def scores(judge, trajs, cfg):
    """What the judge thinks of each episode (E,), no gradient. It reads all turns as one text; see judged()."""
    result = torch.zeros(len(trajs), device=cfg.device, dtype=judge.emb.weight.dtype)
    with torch.no_grad():
        for batch in pack(list(map(judged, trajs)), cfg.pack_tokens):
            result[batch.index] = evaluate(judge, batch.to(cfg.device))[1]
    return result


def judged(traj):
    """An episode as one branch, of which the last token counts alone: the value of the row before it is the score."""
    ids = full(traj.turns)
    branch = Branch()
    branch.extend(ids[:-1], trained=False)
    branch.extend(ids[-1:], trained=True)
    return dataclasses.replace(traj, branches=[branch])


def prefer(cfg, learner, optimiser, actor, policy, step, rank, world_size):
    """One step of the judge: which of two episodes of a task is better? (Bradley-Terry, as in arXiv 2203.02155.)

    Whoever is asked prefers the first with probability sigmoid(4 (its share of right answers - that of the second)). The loss
    -log sigmoid(s_better - s_worse) has the gradient -sigmoid(s_worse - s_better) in s_better, and its opposite in s_worse: `push`.
    """
    pairs = range(rank, cfg.judge_batch // 2, world_size)
    worlds = [world(cfg, cfg.seed, JUDGE, step, i) for i in pairs for _ in range(2)]
    trajs = rollout(actor, worlds, policy, [rng(cfg.seed, JUDGE, step, i, 2 + which) for i in pairs for which in range(2)])
    share = torch.tensor([traj.reward for traj in trajs], device=cfg.device).view(-1, 2)  # (pairs, 2)
    draws = torch.tensor([rng(cfg.seed, JUDGE, step, i, 4).random() for i in pairs], device=cfg.device)  # (pairs,)
    sign = torch.where(draws < (4 * (share[:, 0] - share[:, 1])).sigmoid(), 1.0, -1.0)  # (pairs,): is the first preferred
    s = scores(learner_model(learner), trajs, cfg).view(-1, 2)
    margin = sign * (s[:, 0] - s[:, 1])  # (pairs,)
    push = (torch.stack([-sign, sign], -1) * (-margin).sigmoid()[:, None]).flatten()  # (E,): d loss / d score
    n = total(torch.tensor(float(len(pairs)), device=cfg.device))

    def losses(batch, logp, value, entropy):
        return ((push[batch.index] * value).sum() + 0.0 * logp.sum()) / n

    norm = optimise(learner, optimiser, cfg, [(p, losses) for p in pack(list(map(judged, trajs)), cfg.pack_tokens)])
    sums = total(torch.stack([-nn.functional.logsigmoid(margin).sum(), (0.5 + 0.5 * margin.sign()).sum()])) / n
    return dict(loss=sums[0].item(), agrees=sums[1].item(), norm=norm, skipped=int(not np.isfinite(norm)), tokens=int(n))


def learner_model(learner):
    """The GPT in a Learner, wrapped by DDP or not."""
    return getattr(learner, "module", learner).model


def reinforce(cfg, learner, optimiser, reference, policy, environments, step, rank, world_size, judge=None):
    """One PPO iteration on this process's `environments`: play, weigh, learn."""
    # Play.
    model = learner_model(learner)
    trajs = rollout(model, environments, policy, [rng(cfg.seed, PPO, step, rank + world_size * i, 2) for i in range(len(environments))])
    views = [LAYOUTS[cfg.layout](traj) for traj in trajs] if policy is mem1 else trajs  # what the learner sees
    # Weigh. All of what is trained, flat (M,), in the order of sampling.
    like = dict(dtype=model.emb.weight.dtype, device=cfg.device)
    acted, old_value = (torch.tensor(recorded(trajs, name), **like) for name in ("logp", "value"))  # each (M,)
    old_logp = acted.clone()
    lengths = torch.tensor([traj.n_trained for traj in trajs])  # (E,)
    last = torch.zeros(len(old_logp), dtype=torch.bool, device=cfg.device)  # (M,)
    last[lengths.cumsum(0) - 1] = True
    ref_logp = torch.zeros_like(old_logp)  # (M,)
    with torch.no_grad():
        for batch in pack(views, cfg.pack_tokens):
            batch = batch.to(cfg.device)
            ref_logp[batch.index] = evaluate(reference, batch)[0]
            if cfg.layout != "tree":  # as in the paper's code: not what acted, but what the learner now says of it
                old_logp[batch.index], old_value[batch.index] = evaluate(model, batch)[:2]
    earned = [traj.rewards(cfg.reward) for traj in trajs]
    if judge:
        for turns, score in zip(earned, scores(judge, trajs, cfg).sigmoid().tolist()):
            turns[-1] = score
    reward = torch.tensor([x for turns in earned for x in turns], device=cfg.device)  # (J,) a turn
    ends = torch.zeros_like(last)  # (M,)
    ends[torch.tensor([len(turn.written) for traj in trajs for turn in traj.turns]).cumsum(0) - 1] = True
    rewards = ppo.token_rewards(reward, ends, old_logp, ref_logp, cfg.kl_coef)
    adv, ret = ppo.gae(rewards, old_value, last, cfg.gamma, cfg.lam)
    adv = ppo.whiten(adv, total)

    # Learn.
    sums, gap, norms = torch.zeros(4, **like), torch.zeros(1, **like), []

    def losses(batch, logp, value, entropy, n, first):
        old, v, i = old_logp[batch.index], old_value[batch.index], batch.index  # each (M',)
        if first:  # nothing is updated yet: the learner must say what the sampler said
            gap.copy_(torch.cat([gap, (logp.detach() - acted[i]).abs()]).max())
        with torch.no_grad():
            sums.add_(torch.stack([torch.tensor(float(len(i)), **like), entropy.sum(),
                                   ppo.approx_kl(logp, old).sum(), ppo.clipped(logp, old, cfg.clip).sum()]))
        loss = ppo.policy_loss(logp, old, adv[i], cfg.clip) + cfg.value_coef * ppo.value_loss(value, v, ret[i], cfg.clip)
        return loss.sum() / n

    def read(batch, logp, value, entropy, n):  # a little of the primer, or reading skills erode
        return (0.0 * value.sum() - cfg.primer_coef * logp.sum()) / n

    for epoch in range(cfg.ppo_epochs):
        order = rng(cfg.seed, PPO, step, epoch, 3).permutation(cfg.ppo_batch)  # of all processes
        lanes = 8 if cfg.ppo_batch % (8 * cfg.ppo_minibatches) == 0 else 1  # of 2, 4 or 8 processes each has as many in a minibatch
        order = order[np.argsort(order % lanes, kind="stable")].reshape(lanes, -1)
        for k, chosen in enumerate(np.array_split(order, cfg.ppo_minibatches, axis=1)):
            chosen = [e // world_size for e in sorted(chosen.flat) if e % world_size == rank]
            packs = pack(views, cfg.pack_tokens, which=chosen)
            key = cfg.primer_steps + cfg.demos_steps + (step * cfg.ppo_epochs + epoch) * cfg.ppo_minibatches + k
            exercises = [exercise(cfg, key, i, cfg.primer_longest) for i in range(rank, cfg.ppo_primer, world_size)]
            reading = pack(exercises, cfg.pack_tokens) if cfg.ppo_primer else []
            learn, keep_reading = partial(losses, n=count(packs, cfg), first=epoch == k == 0), partial(read, n=count(reading, cfg))
            norms.append(optimise(learner, optimiser, cfg, [(p, learn) for p in packs] + [(p, keep_reading) for p in reading]))
    trained, entropy, kl, clip = total(sums).tolist()  # sums over the tokens of all epochs
    rows = torch.tensor([[t.reward, t.env.em, t.env.n_objectives, t.peak, len(full(t.turns)), len(t.turns),
                          t.valid / len(t.turns)] for t in trajs], device=cfg.device)  # (E, 7)
    means = (total(rows.sum(0)) / cfg.ppo_batch).tolist()
    return dict(zip(("reward", "em", "of", "peak", "unpruned", "turns", "valid"), means), kl=kl / trained, clip=clip / trained,
                ent=entropy / trained, ev=ppo.explained_variance(old_value, ret, total), gap=most(gap).item(),
                norm=norms[-1], skipped=int((~np.isfinite(norms)).sum()), tokens=int(trained))


# ----------------------------------------------------------------------------------------------
# The run


def stop(code, message, rank=0):
    """End this process with an exit code (see the head of this file), the first with one line on stderr."""
    if rank == 0:
        print(f"train.py: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def run(rank, world_size, cfg):
    """Every process runs this; rank 0 alone prints and writes."""
    signals = [0]
    on_stop(lambda number, frame: signals.append(number))  # the step is finished and saved first
    parent = torch.multiprocessing.parent_process()
    if parent and not parent.is_alive():  # it died before this process could be told
        sys.exit(6)
    torch.set_num_threads(cfg.threads)
    tqdm.set_lock(threading.RLock())  # instead of a semaphore, which a process that is killed would leave behind
    over = threading.Event()
    try:
        if world_size > 1:
            patience = datetime.timedelta(seconds=cfg.timeout * (20 if cfg.compile else 1))
            store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=patience))
            dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo", store=dist.PrefixStore("group", store), rank=rank,
                                    world_size=world_size, timeout=patience)
            threading.Thread(target=watch, args=(store.clone(), rank, world_size, cfg, over), daemon=True).start()
        if cfg.device == "cuda":
            cfg.device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank))}"
            torch.cuda.set_device(cfg.device)
            torch.set_float32_matmul_precision("high")  # TF32
        train(rank, world_size, cfg, signals)
        if world_size > 1:
            over.set()
            dist.barrier(group=evaluation.patient())
            dist.destroy_process_group()
    except torch.OutOfMemoryError:
        stop(1, f"the GPU is out of memory; a lower --pack-tokens or --ppo-batch needs less; {to_go_on(cfg)}")
    except RuntimeError as error:
        if world_size == 1 or not (isinstance(error, dist.DistError) or re.search("gloo|nccl|connection|timed out", str(error), re.I)):
            raise
        lost(rank, world_size, cfg)
    finally:
        over.set()


def lost(rank, world_size, cfg):
    """End this process since another one does not answer."""
    if "RANK" in os.environ:  # torchrun; else the parent says it, once
        print(f"train.py: process {rank} of {world_size} lost another: it died, or was silent for {cfg.timeout} s; {to_go_on(cfg)}", file=sys.stderr, flush=True)
    os._exit(6)  # without waiting for it


def watch(store, rank, world_size, cfg, over):
    """In a thread, whatever the process is busy with: every second sign that it lives, and see that the next one has signed, too."""
    count, since, other = 0, time.monotonic(), (rank + 1) % world_size
    store.set_timeout(datetime.timedelta(seconds=cfg.timeout))
    while not over.is_set():
        try:
            store.add(f"alive {rank}", 1)
            signed = store.add(f"alive {other}", 0)
        except RuntimeError:  # the store is gone, and with it process 0
            signed, since = count, -math.inf
        if signed != count:
            count, since = signed, time.monotonic()
        if time.monotonic() - since > cfg.timeout and not over.is_set():
            lost(rank, world_size, cfg)
        time.sleep(1)


@contextlib.contextmanager
def writing(cfg):
    """What can not be written ends the run."""
    try:
        yield
    except OSError as error:
        stop(5, f"{error.filename or cfg.out} can not be written: {error.strerror}; nothing written before is lost; {to_go_on(cfg)}")


def to_go_on(cfg):
    return "to go on: the same command with --resume" if "RANK" in os.environ else f"to go on: python train.py --out {cfg.out} --resume"


def on_stop(handler):
    """What to do on Ctrl-C and on SIGTERM."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, handler)


def train(rank, world_size, cfg, signals):
    """All stages from where the run stands, then the final table. signals: those that came in; the last one counts."""
    ENC.add(envs.words_of(cfg))
    out = Path(cfg.out)
    lock = alone(out) if rank == 0 else None  # held as long as this process lives

    def say(line):
        try:
            tqdm.write(line) if rank == 0 else None
        except BrokenPipeError:  # nobody listens any more; metrics.jsonl has all of it
            sys.stdout = open(os.devnull, "w")

    stages = stages_of(cfg)
    state = begin(cfg, stages, rank)
    started = time.perf_counter() - state["seconds"]

    def keep(**kwargs):
        state.update(kwargs, seconds=time.perf_counter() - started)
        if rank == 0:
            with writing(cfg), open(out / "metrics.jsonl", "a") as file:
                os.fsync(file.fileno())  # what leads to a checkpoint is on the disk before it
                save(out / "checkpoint.pt", state, previous=out / "previous.pt")
        if world_size > 1:
            dist.barrier(group=evaluation.patient())  # nobody waits in a training step, or leaves, while it is being written

    if not cfg.resume:
        keep()
    while state["stage"] < len(stages):
        stage, agent = stages[state["stage"]]
        steps = steps_of(cfg, (stage, agent))
        model, reference, judge, optimiser = build(cfg, stage, agent, state)
        learner = distribute(model, cfg, world_size)
        lr, every = getattr(cfg, f"{stage}_lr"), cfg.eval_every * (1 if stage == "ppo" else 25)
        needs = farthest_needs(cfg, agent) if agent else None

        bar = tqdm(range(state["step"], steps), initial=state["step"], total=steps, desc=f"{stage} {agent or ''}",
                   disable=True if rank else None, leave=False)
        for step in bar:
            began = time.perf_counter()
            for group in optimiser.param_groups:
                group["lr"] = lr * schedule(step, steps, warmup=3 if stage == "ppo" else 50)
            if stage == "ppo":
                mine = [world(cfg, cfg.seed, PPO, step, i) for i in range(rank, cfg.ppo_batch, world_size)]
                row = reinforce(cfg, learner, optimiser, reference, POLICIES[agent], mine, step, rank, world_size, judge)
            elif stage == "judge":
                row = prefer(cfg, learner, optimiser, reference, POLICIES[agent], step, rank, world_size)
            else:
                row = imitate(cfg, learner, optimiser, agent, step, rank, world_size, needs)
            row["tok_s"] = row.pop("tokens") / (time.perf_counter() - began)
            state["skipped"] = state["skipped"] + 1 if row["skipped"] else 0
            done = step + 1
            if stage in ("demos", "ppo") and (done % every == 0 or done == steps):
                looks, em = look(model, agent, cfg, rank, world_size)
                row.update(looks)
                if stage == "ppo" and (not state["best"] or em >= state["best"][0]):
                    state["best"] = [em, weights_of(model)]
            if rank == 0:
                row = dict(stage=stage, agent=agent, step=done, minutes=(time.perf_counter() - started) / 60, **row)
                with writing(cfg), open(out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                if stage == "ppo" or done % (10 if stage == "judge" else 50) == 0 or done == steps:
                    say(line(stage, agent, done, steps, row, (time.perf_counter() - began) * (steps - done)))
            if state["skipped"] == 5:
                stop(4, f"{stage} step {done}: losses or gradients were not finite in five steps in a row; begin anew with a lower --{stage}-lr (it is {lr})", rank)
            stopping = int(most(torch.tensor([signals[-1]], device=cfg.device)))
            if done % every == 0 or done == steps or stopping:
                keep(step=done, model=model.state_dict(), optimiser=optimiser.state_dict())
            if stopping:
                on_stop(signal.SIG_IGN)  # once is enough
                say(f"stopped after {stage} step {done}/{steps}; {to_go_on(cfg)}")
                sys.exit(128 + stopping)
        weights = state["best"][1] if stage == "ppo" else weights_of(model)  # PPO: early stopping, chosen by validation
        state["models"][name_of(stage, agent)] = [dataclasses.asdict(model.config), weights]
        keep(stage=state["stage"] + 1, step=0, model=None, optimiser=None, best=None)

    def leave(number, frame=None):
        on_stop(signal.SIG_IGN)
        say(f"stopped before the final table; {to_go_on(cfg)}")
        sys.exit(128 + number)

    on_stop(leave)  # all is saved
    if signals[-1]:
        leave(signals[-1])
    results = evaluation.table(state["models"], cfg, evaluation.methods(state["models"]), say, cfg.eval_episodes, rank, world_size, cfg.device)
    meta = dict(seed=cfg.seed, episodes=cfg.eval_episodes, minutes=(time.perf_counter() - started) / 60, **evaluation.provenance())
    if rank == 0:
        with writing(cfg):
            write_atomically(out / "results.json", json.dumps({**results, "meta": meta}, indent=1).encode())
    say(evaluation.trend(results))
    say(f"{meta['minutes']:.0f} minutes; results in {out}/results.json; see what the agent does: python eval.py {out} --show 2")


def look(model, agent, cfg, rank, world_size):
    """Validation at 2 and at 16 objectives: what to log, and the EM of the farther."""
    row = {}
    for n in sorted({min(n, max(cfg.eval_objectives)) for n in (2, 16)}):
        r = evaluation.measure(model, POLICIES[agent], cfg, n, cfg.valid_episodes, evaluation.VALID, rank, world_size)
        row.update({f"{key}@{n}": r[key] for key in ("em", "peak")})
    return row, r["em"]


def alone(out):
    """A lock on a run's directory, as long as what is returned stays open: two processes that write there would lose both runs."""
    try:
        file = open(out / "lock", "w")
    except OSError as error:
        stop(2, f"--out {out}: {error.strerror}; give a directory that can be written to")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(2, f"--out {out}: another train.py is at work there; wait until it ends, or give another --out")
    except OSError:
        pass  # a file system that has no locks
    return file


def begin(cfg, stages, rank):
    """The state of a run, new or from its last checkpoint. The first process brings the directory in line with it: it writes
    config.json, and takes out of metrics.jsonl what comes after the checkpoint."""
    out, state, told = Path(cfg.out), dict(stage=0, step=0, seconds=0.0, skipped=0, models={}, model=None, optimiser=None, best=None), []
    if cfg.resume:
        try:
            state, told = evaluation.last_state(out, cfg)
            if state["stage"] > len(stages) or state["step"] > (steps_of(cfg, stages[state["stage"]]) if state["stage"] < len(stages) else 0):
                raise ValueError(f"the checkpoint in {out} is at a stage and step that this run does not have")
            if missing := {name_of(*stage) for stage in stages[: state["stage"]]} - {*state["models"]}:
                raise ValueError(f"the checkpoint in {out} is without its {', '.join(sorted(missing))}")
        except ValueError as problem:
            stop(3, f"--resume: {problem}; there is nothing to go on from, begin anew with another --out", rank)
    elif cfg.start:
        models = evaluation.load_run(cfg.start)[1]
        state["models"] = {f"{agent}-demos": models[f"{agent}-demos"] for _, agent in stages}
    here = torch.tensor([state["stage"], state["step"]], device=cfg.device)
    if (most(here.clone()) != -most(-here)).any():
        stop(3, f"--resume: the processes found different checkpoints in {out}; it must be on a disk that all machines share", rank)
    if rank:
        return state
    with writing(cfg):
        if told:
            print(*(f"train.py: {problem}" for problem in told), sep="\n", file=sys.stderr)
            os.replace(out / "previous.pt", out / "checkpoint.pt")  # the next one would push the good one out
        config = dict(config={**dataclasses.asdict(cfg), "device": cfg.device.split(":")[0]}, **evaluation.provenance())
        write_atomically(out / "config.json", json.dumps(config, indent=1).encode())
        metrics, kept = out / "metrics.jsonl", []
        for text in metrics.read_text().splitlines(True) if metrics.exists() and cfg.resume else []:
            try:
                row = json.loads(text)
                at = stages.index((row["stage"], row["agent"])), row["step"]
                if at <= (state["stage"], state["step"]) and text.endswith("\n"):  # what comes later is done again
                    kept.append(text)
            except (ValueError, KeyError, TypeError):
                pass  # half a line, of a process that was killed
        write_atomically(metrics, "".join(kept).encode())
    return state


def stages_of(cfg):
    """[(stage, agent), ...] of a run, in order."""
    stages = [] if cfg.start else [("primer", None)]
    for agent in cfg.agents:
        stages += [] if cfg.start else [("demos", agent)]
        stages += [("judge", agent)] * (cfg.reward == "judge") + [("ppo", agent)]
    return stages


def steps_of(cfg, stage):
    return getattr(cfg, f"{stage[0]}_steps")


def name_of(stage, agent):
    """Of the model that comes out of a stage."""
    return agent if stage == "ppo" else f"{agent}-{stage}" if agent else stage


def build(cfg, stage, agent, state):
    """What a stage works with: the model that learns, the reference it starts from, the judge (if any), the optimiser."""
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_config(cfg)).to(cfg.device)
    model.half = cfg.dtype == "bfloat16"
    source = {"primer": None, "demos": "primer"}.get(stage, f"{agent}-demos")
    if source:
        model.load_state_dict(state["models"][source][1])
    reference = copy.deepcopy(model).requires_grad_(False)  # what PPO is kept near to, and what plays for the judge
    judge = evaluation.load(state["models"][f"{agent}-judge"], cfg.device) if stage == "ppo" and cfg.reward == "judge" else None
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=cfg.weight_decay, eps=1e-8,
                                  fused=cfg.device.startswith("cuda"))
    if state["model"]:
        model.load_state_dict(state["model"])
        for group in state["optimiser"]["param_groups"]:
            group["fused"] = cfg.device.startswith("cuda")  # where it runs now, not where it was saved
        optimiser.load_state_dict(state["optimiser"])
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64  # the shapes of several agents, with gradients and without
        for block in [*model.blocks, *reference.blocks]:
            block.compile()
    return model, reference, judge, optimiser


def weights_of(model):
    """A copy on the CPU, which further steps do not change."""
    return {key: value.cpu().clone() for key, value in model.state_dict().items()}


def gpt_config(cfg):
    return GPTConfig(ENC.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd)


def farthest_needs(cfg, agent):
    """Tokens in the longest context, and turns, at the farthest horizon to be tested: positions and counting are trained up to there."""
    n = max(cfg.eval_objectives)
    trajs = [demonstrate(world(cfg, cfg.seed, evaluation.VALID, 0, i, n), POLICIES[agent]) for i in range(4)]
    return max(len(traj.task) + traj.peak for traj in trajs), max(traj.env.max_turns for traj in trajs)


def line(stage, agent, step, steps, row, seconds):
    """A step as a line for people: what matters first."""
    head = f"{stage} {agent or '':4s} {step:04d}/{steps:04d} | "
    tail = f"{row['tok_s'] / 1e3:4.1f}k tok/s | eta {seconds / 60:.0f}m"
    looks = "".join(f" | em@{key[3:]} {row[key]:.2f}" for key in row if key.startswith("em@"))
    if stage != "ppo":
        agrees = f" | agrees {row['agrees']:.0%}" if stage == "judge" else ""
        return f"{head}loss {row['loss']:.4f}{agrees}{looks} | {tail}"
    return (f"{head}reward {row['reward']:.2f} | em {row['em']:.2f}/{row['of']:.1f} | peak {row['peak']:.0f} vs full "
            f"{row['unpruned']:.0f} ({row['unpruned'] / row['peak']:.1f}x) | turns {row['turns']:.1f} | kl {row['kl']:.3f} | "
            f"clip {row['clip']:.0%} | ent {row['ent']:.2f} | ev {row['ev']:.2f} | gap {row['gap']:.0e}{looks} | {tail}")


def main():
    cfg, given = parse_arguments()
    out, rank = Path(cfg.out), int(os.environ.get("RANK", 0))  # several under torchrun
    if rank == 0:
        if not cfg.resume and any((out / name).exists() for name in evaluation.CHECKPOINTS):
            stop(2, f"--out {out} holds a run already; add --resume to go on with it, or give another --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
            if cfg.facts and not cfg.sweep and Path(cfg.facts).resolve().parent != out.resolve():
                cfg.facts = shutil.copy(cfg.facts, out)  # the run keeps a copy: its vocabulary must not change
        except OSError as error:
            stop(2, f"--out {out}: {error.strerror}; give a directory that can be written to")
    if cfg.sweep:
        return sweep(cfg, given)
    if "RANK" in os.environ or cfg.nproc == 1:
        return run(rank, cfg.nproc, cfg)
    with socket.socket() as s:  # a free port to meet at
        s.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), TORCH_CPP_LOG_LEVEL="ERROR")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # what is said below is enough
    signals = []
    on_stop(signal.SIG_IGN)  # as long as the children start: they take it over
    children = torch.multiprocessing.spawn(run, (cfg.nproc, cfg), nprocs=cfg.nproc, join=False)
    on_stop(lambda number, frame: signals.append(number))
    try:
        while not children.join(timeout=1, grace_period=5):
            for process in children.processes if signals else []:  # again and again: one that is starting does not hear it yet
                if process.is_alive():
                    os.kill(process.pid, signals[-1])
    except torch.multiprocessing.ProcessExitedException as error:
        codes = [process.exitcode for process in children.processes]
        for code in codes:
            if code > 0 and code != 6:  # it has said why
                sys.exit(code)
        killed = [i for i, code in enumerate(codes) if code == -signal.SIGKILL]
        gone = [error.error_index] if codes[error.error_index] < 0 else killed
        who = f"process {gone[0]} of {cfg.nproc}" if gone else "one of the processes"
        stop(6, f"{who} died, or was silent for {cfg.timeout} s; {to_go_on(cfg)}")


def sweep(cfg, given):
    """Ordinary runs below cfg.out, cfg.nproc side by side, each of one process; then all tables and figures.

    Started again, it goes on: what is finished is kept, what was begun is resumed. given: the fields that the
    user set, passed on to every run.
    """
    out, assets, multiple, stopped = Path(cfg.out), Path(cfg.assets), 2 * cfg.n_head, []
    lock = alone(out)  # held as long as this process lives
    given = {name: value for name, value in given.items() if name not in ("sweep", "assets", "out", "nproc", "resume")}
    jobs = {f"seed-{s}": {**given, "seed": s, "agents": list(POLICIES)} for s in range(cfg.sweep)}
    wide = round(cfg.n_embd * 2**0.5 / multiple) * multiple  # twice the parameters
    jobs |= {f"wide-{s}": {**given, "seed": s, "agents": ["full"], "n_embd": wide} for s in range(cfg.sweep)}
    waiting, running, failed = [], {}, []
    for name, fields in jobs.items():
        if not (out / name / "results.json").is_file():
            waiting.append(name)
            continue
        config = json.loads((out / name / "config.json").read_text())["config"]
        for field in fields:
            if field not in ("device", "threads", "facts") and config[field] != fields[field]:
                sys.exit(f"train.py: {out / name} is finished, with {field} {config[field]}, not {fields[field]}; leave the flag away, or give another --out")
    print(f"{len(jobs)} runs, {len(waiting)} of them to do, {cfg.nproc} side by side; {forecast([jobs[name] for name in waiting], assets, cfg.nproc)}", flush=True)

    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, lambda number, frame: stopped.append(number))
    while running or waiting and not stopped:
        while waiting and len(running) < cfg.nproc and not stopped:
            name = waiting.pop(0)
            fields = dict(jobs[name], out=out / name, nproc=1)
            words = ["--resume"] * any((out / name / checkpoint).is_file() for checkpoint in evaluation.CHECKPOINTS)
            for field, value in fields.items():
                flag = field.replace("_", "-")
                words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", *(value if isinstance(value, list) else [value])]
            slot = min({*range(cfg.nproc)} - {slot for slot, _ in running.values()})
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            gpu = {"CUDA_VISIBLE_DEVICES": gpus.split(",")[slot % torch.cuda.device_count()]} if cfg.device == "cuda" else {}
            out.mkdir(parents=True, exist_ok=True)
            print(f"{time.strftime('%H:%M')} {name} begins; its log is {out / name}.log", flush=True)
            with open(out / f"{name}.log", "a") as log:
                running[name] = slot, subprocess.Popen([sys.executable, __file__, *map(str, words)], stdout=log, stderr=log,
                                                       env={**os.environ, **gpu}, start_new_session=True)
        time.sleep(0.5)
        for name, (_, process) in [*running.items()]:
            if stopped:  # they save, and end
                process.send_signal(signal.SIGTERM)
            if process.poll() is not None:
                failed += [name] if running.pop(name)[1].returncode else []
                print(f"{time.strftime('%H:%M')} {name} ends with exit code {process.returncode}", flush=True)
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)
    if stopped:
        print("stopped; the same command goes on")
        sys.exit(128 + stopped[0])
    if failed:
        sys.exit(f"train.py: not finished: {', '.join(failed)}; the .log files in {out} say why; the same command goes on")
    evaluation.publish(evaluation.collect([out / name for name in jobs], print), assets)
    print(f"results in {assets / 'results.json'}; the tables: python eval.py --table {' '.join(str(out / name) for name in jobs)}")


def forecast(jobs, assets, nproc):
    """How long these runs will take, going by what an agent took in the last sweep; twice the weights take twice as long."""
    if not (assets / "results.json").is_file():
        return f"how long they take is not known: there is no {assets / 'results.json'} of an earlier sweep"
    meta = json.loads((assets / "results.json").read_text())["meta"]
    narrow = min(run["config"]["n_embd"] for run in meta.values())
    agent = np.mean([run["minutes"] / len(run["config"]["agents"]) for run in meta.values() if run["config"]["n_embd"] == narrow])
    hours = sum(agent * len(job["agents"]) * (2 if job["agents"] == ["full"] else 1) for job in jobs) / 60 / nproc
    return f"about {hours:.1f} hours, going by the last sweep ({next(iter(meta.values()))['machine']}, and its flags)"


CHOICES = dict(preset=[*PRESETS], device=["auto", "cpu", "cuda"], dtype=["auto", "float32", "bfloat16"], env=[*envs.ENVS], layout=[*LAYOUTS],
               agents=[*POLICIES], kinds=[*envs.KINDS], reward=[*envs.REWARDS, "judge"])


def listed(kind, choices, text):
    """One argument of a list: `2,16` -> [2, 16], so that spaces and commas are the same. For argparse."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}")
    for value in values:
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"invalid choice: {value!r} (choose from {', '.join(map(repr, choices))})")
    return values


def parse_arguments():
    """(Config, the fields that were given) from the command line: a flag a field, a preset's values instead of the defaults."""
    reasons = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    torchrun = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") if name in os.environ}
    first = torchrun.get("RANK", "0") == "0"  # the others are silent
    parser.error = lambda message: parser.exit(2, f"train.py: {message} (python train.py --help lists the flags)\n" * first)
    if torchrun and (len(torchrun) < 4 or not all(value.isdecimal() for value in torchrun.values())):
        parser.error(f"the environment has {torchrun}: expected RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE as torchrun sets them, or none of them")
    for f in dataclasses.fields(Config):
        flag, text = "--" + f.name.replace("_", "-"), reasons.get(f.name, "") + f" [{f.default}]"
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text.replace("%", "%%"))
        elif f.name == "sweep":
            parser.add_argument(flag, type=int, nargs="?", const=3, help=text)
        elif f.type is tuple:
            kind, choices = type(f.default[0]), CHOICES.get(f.name)
            parser.add_argument(flag, type=partial(listed, kind, choices), nargs="+", metavar=choices and "{%s}" % ",".join(choices), help=text.replace("%", "%%"))
        else:
            parser.add_argument(flag, type=f.type, choices=CHOICES.get(f.name), help=text.replace("%", "%%"))
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    given = {name: sum(value, []) if isinstance(value, list) else value for name, value in given.items()}
    if given.get("dtype") == "auto":
        del given["dtype"]  # what is meant by it follows from the device
    given.setdefault("preset", "gpu" if torch.cuda.is_available() else "cpu")
    preset = PRESETS[given["preset"]]
    out = Path(given.get("out", preset.get("out", Config.out)))
    if given.get("resume"):  # a run keeps the configuration it began with, but for where it runs
        if not any((out / name).is_file() for name in evaluation.CHECKPOINTS):
            parser.error(f"--resume: {out} holds no checkpoint; give the --out of an interrupted run, or leave --resume away")
        preset = {**read_config(out / "config.json", parser.error), "out": str(out)}
        preset["facts"] = preset["facts"] and str(out / Path(preset["facts"]).name)  # the run's own copy
        for name in given.keys() - {"out", "resume", "device", "nproc", "threads", "timeout", "compile", "preset"}:
            same = Path(given[name]).name == Path(preset[name]).name if name == "facts" else given[name] == preset[name]  # of the facts the run has a copy
            if not same:
                parser.error(f"--{name.replace('_', '-')} {given[name]}: this run began with {preset[name]}; leave the flag away")
        given.pop("preset"), given.pop("facts", None)
    cfg = Config(**{**preset, **given})
    if "sweep" in given:
        for name in given.keys() & {"resume", "start", "agents", "seed"}:
            parser.error(f"--sweep --{name}: a sweep trains all agents from its own seeds, and goes on by itself; leave --{name} away")
        cfg.out = given.get("out", "runs/sweep" if preset == PRESETS["cpu"] else f"{cfg.out}-sweep")
        cfg.assets = given.get("assets", "assets" if preset == PRESETS["cpu"] else f"{cfg.out}/assets")
    gpus = torch.cuda.device_count()
    if cfg.device == "auto":
        cfg.device = "cuda" if gpus else "cpu"
    if cfg.device == "cuda" and not gpus:
        parser.error("--device cuda: torch finds no GPU here; --device cpu trains on the CPU")
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if cfg.device == "cuda" else "float32"
    have, what = (gpus, "GPUs") if cfg.device == "cuda" else (os.cpu_count(), "cores")
    if torchrun and given.get("nproc", 0) not in (0, int(torchrun["WORLD_SIZE"])):
        parser.error(f"--nproc {cfg.nproc}: torchrun has started {torchrun['WORLD_SIZE']} processes; leave --nproc away")
    here = int(torchrun.get("LOCAL_WORLD_SIZE", cfg.nproc))
    if not 0 <= here <= have:
        parser.error(f"--nproc {here}: expected at most one for each of the {have} {what} of this machine")
    cfg.nproc = int(torchrun.get("WORLD_SIZE", 0)) or cfg.nproc or (have if what == "GPUs" else min(4, have))
    check(cfg, parser.error)
    check_run(cfg, parser.error)
    for line in envs.read_facts(cfg.facts, cfg.skip_bad_facts)[1] if cfg.facts and first else []:
        print(f"{cfg.facts}: {line}")
    return cfg, given


def read_config(path, error, whole=True):
    """The fields of a run's config.json, each of the type that it has in Config. whole: all of them, as this version writes them."""
    try:
        fields = dict(json.loads(path.read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        error(f"{path} is not the configuration of a run ({type(problem).__name__}: {problem}); begin anew with another --out")
    names = {f.name: f for f in dataclasses.fields(Config)}
    if {*fields} != {*names} and (whole or not {*fields} < {*names}):
        error(f"{path}: begun by another version of train.py ({', '.join(sorted({*fields} ^ {*names}))[:80]}); go on with that one, or begin anew")
    for name, value in fields.items():
        kind, parts = names[name].type, value if isinstance(value, list) else [value]
        kinds = {type(names[name].default[0])} if kind is tuple else {int, float} if kind is float else {kind}
        if isinstance(value, list) != (kind is tuple) or not all(type(part) in kinds for part in parts):
            error(f"{path}: {name} is {str(value)[:40]}, expected {kind.__name__}; it is not what train.py wrote")
    return fields


def check(cfg, error):
    """Every mistake in a configuration by itself: error(what was given, what was expected)."""
    for name, choices in CHOICES.items():
        values = getattr(cfg, name)
        values = values if isinstance(values, (list, tuple)) else [values]
        if not values or any(value not in choices for value in values):
            error(f"--{name} {' '.join(map(str, values))}: expected {', '.join(choices)}")
    for name in "objectives", "hops":
        bounds = getattr(cfg, name)
        if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
            error(f"--{name} {getattr(cfg, name)}: expected the fewest and the most, e.g. --{name} 1 2")
    cores = os.cpu_count()
    bounds = {  # field: lowest, highest
        **dict.fromkeys("primer_steps primer_batch demos_steps demos_batch ppo_steps ppo_batch judge_steps ppo_epochs ppo_minibatches eval_every "
                        "eval_episodes valid_episodes pack_tokens top_k timeout".split(), (1, 10**9)),
        **dict.fromkeys("n_head n_embd".split(), (1, 2**14)), "n_layer": (1, 2**10), "threads": (1, cores), "seed": (0, 2**31), "sweep": (0, 10**3),
        **dict.fromkeys("primer_lr demos_lr ppo_lr judge_lr clip grad_clip".split(), (1e-12, 1e6)), "hurry": (0, 0.5),
        **dict.fromkeys("forget gamma lam".split(), (0, 1)), **dict.fromkeys("primer_coef kl_coef value_coef weight_decay".split(), (0, 1e6)),
        "names": (len(envs.NAMES), len(envs.ALL_NAMES)), "ppo_primer": (0, 10**9), "primer_longest": (2, len(envs.INDICES))}
    for name, (lowest, highest) in bounds.items():
        if not lowest <= getattr(cfg, name) <= highest:
            error(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected {lowest} to {highest}")
    if not cfg.out or not cfg.assets:
        error("--out and --assets: expected the name of a directory")
    if cfg.n_embd % (2 * cfg.n_head):
        error(f"--n-embd {cfg.n_embd} --n-head {cfg.n_head}: expected a multiple of twice the heads")
    try:
        cfg.facts and envs.read_facts(cfg.facts, cfg.skip_bad_facts)
    except (OSError, ValueError) as problem:
        error(f"--facts: {problem}")
    if (cfg.facts or cfg.env != "qa") and [*cfg.kinds] != ["list"]:
        error(f"--kinds {' '.join(cfg.kinds)}: in --env {cfg.env}{' --facts' * bool(cfg.facts)} there are no other kinds than list; leave one away")
    if cfg.facts and cfg.env != "qa":
        error(f"--facts {cfg.facts} --env {cfg.env}: a file of facts is asked about in --env qa; leave one away")
    if cfg.names > len(envs.NAMES) and (cfg.facts or cfg.env != "qa"):
        error(f"--names {cfg.names}: only the invented world of --env qa has more names than {len(envs.NAMES)}; leave it away")
    if cfg.hops[1] > len(envs.COLONS):
        error(f"--hops {cfg.hops}: expected at most {len(envs.COLONS)}")
    if not cfg.facts and (cfg.hops[1] + cfg.distractors > len(envs.RELATIONS) or cfg.distractors < 0):
        error(f"--hops {cfg.hops} --distractors {cfg.distractors}: the world has {len(envs.RELATIONS)} relations in all")
    if cfg.ppo_minibatches > cfg.ppo_batch:
        error(f"--ppo-minibatches {cfg.ppo_minibatches}: expected at most the {cfg.ppo_batch} episodes of --ppo-batch")
    farthest = envs.farthest(cfg)
    for name in "objectives", "eval_objectives":
        if not getattr(cfg, name) or not all(1 <= n <= farthest for n in getattr(cfg, name)):
            error(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected 1 to {farthest}: with --hops {cfg.hops} there are no more indices or names")
    for name in "agents", "kinds":
        if len({*getattr(cfg, name)}) < len(getattr(cfg, name)):
            error(f"--{name} {' '.join(getattr(cfg, name))}: expected each only once")


def check_run(cfg, error):
    """Every mistake in where and from what a run is to begin."""
    processes = 1 if cfg.sweep else cfg.nproc
    if cfg.compile and not shutil.which(os.environ.get("CXX", "g++")):
        error("--compile: torch needs a C++ compiler for that (g++, or what $CXX says), and there is none; leave the flag away")
    if cfg.judge_batch < 2 * processes:
        error(f"--judge-batch {cfg.judge_batch}: expected at least two episodes for each process (--nproc {processes})")
    for name in "primer_batch", "demos_batch", "demos_primer", "ppo_batch", "ppo_primer", "valid_episodes", "eval_episodes":
        if getattr(cfg, name) < processes and (name, cfg.ppo_primer) != ("ppo_primer", 0):
            error(f"--{name.replace('_', '-')} {getattr(cfg, name)}: expected at least one for each of the {processes} processes (--nproc)")
    if cfg.start and not cfg.resume:
        try:
            world, models = evaluation.load_run(cfg.start)
        except SystemExit as problem:
            error(f"--start: {str(problem).removeprefix('eval.py: ')}")
        for agent in cfg.agents:
            if f"{agent}-demos" not in models:
                error(f"--start {cfg.start}: this run has not imitated the {agent} agent yet; expected one that has, or other --agents")
        if envs.words_of(cfg) != envs.words_of(world):
            error(f"--start {cfg.start}: its world has other words than this one; give the same --env, --kinds and --facts")
        for name in "n_layer", "n_head", "n_embd":
            if getattr(cfg, name) != getattr(world, name):
                error(f"--start {cfg.start}: its --{name.replace('_', '-')} is {getattr(world, name)}, here it is {getattr(cfg, name)}; give the same")


if __name__ == "__main__":
    main()
