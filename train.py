"""train.py: teach a small GPT to work in constant memory: reading, imitation, reinforcement.

    python train.py                              # laptop: two agents, then the trend of the paper
    python train.py --preset debug               # smoke run, ten seconds
    python train.py --device cuda --nproc 8      # 8 GPUs by DDP
    torchrun --nproc-per-node 8 train.py         # the same; also on several machines
    python train.py --out runs/cpu --resume      # continue an interrupted run
    python train.py --start runs/cpu --seed 1 --out runs/again   # PPO only, from imitated agents

Three stages, each a loop below. Qwen2.5-7B, which the paper starts from, can read; random weights
cannot, hence the first stage:
    primer   copying, editing, looking up, on random words. No environment. Shared by all agents
    demos    imitation, on one and two objectives: the format, how to search, how to carry on a
             list. The notes that mem1 imitates are random (envs.random_notes)
    ppo      reward, on two objectives: that answers are worth noting down
In the last two, most tasks are pieces of longer ones: see training_task(). The agent `mem1` prunes
its context, the agent `full` keeps everything. Besides, `full` imitates oracle notes, which serve it
better, and lists only new answers, since old ones stay in view.

Every random choice is keyed by (seed, stage, step, episode). So a resumed run repeats an
uninterrupted one bit for bit, and any number of processes plays the same episodes.
"""
import argparse
import dataclasses
import datetime
import inspect
import io
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.utils.benchmark import Timer
from tqdm import tqdm

import envs
import ppo
from envs import Stream, keyed_rng
from mem1 import (ENC, LAYOUTS, POLICIES, demonstrate, exercise, expert, keep_last, make_rows,
                  play_history, rollout)
from model import GPT, GPTConfig
from ppo import share


@dataclass
class Config:
    """All settings of a run; each field is a flag of the command line."""
    # run
    preset: str = "cpu"  # several of the fields below at once; default on a GPU: gpu
    out: str = "runs/cpu"  # the run's directory; runs/PRESET unless given
    resume: bool = False  # continue from the checkpoint in --out
    start: str = ""  # a run to take the imitated agents from; only PPO is then run
    seed: int = 0  # of training; test episodes are the same for every seed
    device: str = "auto"  # auto: cuda where there is one
    nproc: int = 0  # processes; 0: one per GPU, or per CPU core (at most 4)
    dtype: str = "auto"  # of matrix products; auto: bfloat16 on a GPU, else float32
    workers: int = 0  # data-loading processes per training process (docker run needs --shm-size 8g)
    play_batch: int = 64  # episodes played side by side
    compile: bool = False  # torch.compile the learner: takes minutes at first, for large models
    agents: tuple = ("mem1", "full")  # context policies to train an agent for, one after the other
    # world
    env: str = "qa"  # qa, or a world of experiments/: web, count, shop, dialogue
    facts: str = ""  # a file of facts to ask about, instead of an invented world
    objectives: tuple = (1, 2)  # fewest and most in demonstrations; PPO uses the most
    hops: tuple = (1, 2)  # fewest and most relations in a question
    kinds: tuple = ("list",)  # list: independent questions; chain (envs.ComposedQA)
    names: int = 200  # of the invented world; those beyond 200 are several tokens each
    around: int = 4  # most questions before and after the agent's own in training; 0: whole tasks
    most_turns: int = 130  # largest turn budget in training: what 64 questions get
    # model
    n_layer: int = 4
    n_head: int = 2  # two wide ones did better than four on long lists
    n_embd: int = 96
    # primer
    primer_steps: int = 300
    primer_batch: int = 64  # exercises per step
    primer_lr: float = 3e-3
    primer_longest: int = 32  # items in a list, reached after 60% of the steps
    exercises: int = 16  # beside each demos batch and PPO minibatch, or reading skills erode
    # demos
    demos_steps: int = 800
    demos_batch: int = 32  # episodes per step
    demos_lr: float = 2e-3
    demos: str = "random"  # notes that mem1 imitates; the other agents imitate oracle notes
    # ppo
    ppo_steps: int = 40
    ppo_batch: int = 128  # episodes per step
    ppo_epochs: int = 2
    ppo_minibatches: int = 2
    ppo_lr: float = 4e-4
    primer_coef: float = 0.3  # weight of the reading exercises beside each minibatch
    clip: float = 0.2  # of the ratio
    kl_coef: float = 0.01  # reward lost per nat of KL from the imitated policy
    gamma: float = 1.0
    lam: float = 1.0
    layout: str = "tree"  # of mem1's trajectories in PPO; all but tree are inexact (mem1.py)
    # optimisation
    grad_clip: float = 1.0
    weight_decay: float = 0.01
    micro_batch: int = 1024  # tokens (not rows) per forward pass: what fits a CPU core's cache
    # evaluation
    eval_every: int = 20  # ppo steps between validations and checkpoints; in other stages 25 times
    eval_objectives: tuple = (1, 2, 4, 8, 16)  # horizons tested
    eval_episodes: int = 128  # per cell of the final table
    valid_episodes: int = 64  # per validation


PRESETS = {
    "cpu": {},
    "debug": dict(
        out="runs/debug", nproc=1, n_layer=2, n_embd=48, primer_steps=40,
        primer_longest=4, demos_steps=40, demos_batch=8, exercises=8, ppo_steps=4, ppo_batch=8,
        eval_every=2, eval_objectives=(1, 2, 4), eval_episodes=8,
        valid_episodes=4),
    "gpu": dict(
        out="runs/gpu", workers=12, play_batch=1024, n_layer=8, n_embd=512, n_head=8, names=1000,
        primer_steps=4000, primer_batch=1024, primer_lr=1e-3, demos_steps=4000, demos_batch=512,
        demos_lr=5e-4, exercises=256, ppo_steps=200, ppo_batch=1024, ppo_lr=1e-4, micro_batch=65536,
        eval_every=50,
        eval_objectives=(1, 2, 4, 8, 16, 32, 64), eval_episodes=1024, valid_episodes=256),
}
CHOICES = dict(preset=[*PRESETS], device=["auto", "cpu", "cuda"],
               dtype=["auto", "float32", "bfloat16"], agents=[*POLICIES],
               kinds=["list", "chain"], layout=[*LAYOUTS], demos=["random", "oracle"])
MAY_BE_ZERO = """seed nproc workers exercises around primer_coef clip kl_coef gamma lam
                 weight_decay""".split()
MAY_CHANGE = "out resume device nproc workers play_batch compile preset".split()  # on --resume

# ----------------------------------------------------------------------------------------------
# The three stages


def train_primer(run):
    """Reading exercises, on lists that get longer."""
    cfg, stage = run.cfg, begin_stage(run, "primer", agent=None, base=None)

    def make(step):
        ramp = min(1.0, step / (0.6 * cfg.primer_steps))
        longest = round(2 + ramp * (cfg.primer_longest - 2))
        trajs = [exercise(cfg, step, i, longest) for i in share(cfg.primer_batch)]
        return make_rows(trajs, cfg.micro_batch)

    for step, batch in with_data(stage, make, cfg):
        set_lr(stage, cfg.primer_lr, step, warmup=50)
        row = imitate(stage.learner, stage.optimizer, batch, cfg)
        end_step(run, stage, step + 1, row)
    end_stage(run, stage)


def train_demos(run, agent):
    """Imitation of the demonstrator, which sees what this agent's context policy keeps."""
    cfg, stage = run.cfg, begin_stage(run, "demos", agent, base="primer")

    def make(step):
        key = cfg.primer_steps + step  # the exercises go on where the primer ended
        trajs = [exercise(cfg, key, i, cfg.primer_longest) for i in share(cfg.exercises)]
        trajs += [demonstration(cfg, agent, step, i) for i in share(cfg.demos_batch)]
        return make_rows(trajs, cfg.micro_batch)

    for step, batch in with_data(stage, make, cfg):
        set_lr(stage, cfg.demos_lr, step, warmup=50)
        row = imitate(stage.learner, stage.optimizer, batch, cfg)
        if is_due(stage, step + 1, cfg):
            row.update(validate(stage.model, agent, cfg))
        end_step(run, stage, step + 1, row)
    end_stage(run, stage)


def train_ppo(run, agent):
    """Reinforcement. The last weights are the result: choosing by validation at 16 objectives would
    use a horizon that is not trained. Snapshots on the way are kept as well, such as `mem1@20`."""
    cfg, stage = run.cfg, begin_stage(run, "ppo", agent, base=f"{agent}-demos")
    reference = load_model(run.state["models"][f"{agent}-demos"], cfg.device).requires_grad_(False)
    policy = POLICIES[agent]

    def make(step):
        return [training_task(cfg, agent, Stream.PPO, step, i) for i in share(cfg.ppo_batch)]

    for step, environments in with_data(stage, make, cfg):
        set_lr(stage, cfg.ppo_lr, step, warmup=3)
        row = ppo.update(stage.learner, stage.optimizer, reference, environments, policy, cfg, step)
        if is_due(stage, step + 1, cfg):
            row.update(validate(stage.model, agent, cfg))
            keep(run, f"{agent}@{step + 1}", stage.model)
        end_step(run, stage, step + 1, row)
    end_stage(run, stage)


def imitate(learner, optimizer, batch, cfg):
    """One step of maximum likelihood on the Rows of exercises and demonstrations. Returns what to
    log."""
    n = ppo.token_count(batch, cfg.device)
    total = torch.zeros((), device=cfg.device)

    def loss(rows):
        nll = ppo.nll(learner, rows)
        total.add_(nll.detach())
        return nll / n

    norm = ppo.optimizer_step(learner, optimizer, [(loss, rows) for rows in batch], cfg.grad_clip)
    processed = sum(rows.ids.numel() for rows in batch)  # padding included
    loss = (ppo.all_sum(total) / n).item()
    return dict(loss=loss, norm=norm, tokens=int(n), processed=processed)


# ----------------------------------------------------------------------------------------------
# Data


def training_task(cfg, agent, stream, step, i):
    """The environment of one episode: most of the time a piece of a longer task.

    before + n + after questions stand in the prompt. The demonstrator has answered the first, under
    this agent's context policy and with its own kind of notes; that is env.history. The agent is to
    answer the next n, and is scored on these alone. If questions come after, the turns run out.

    >>> tasks = [training_task(Config(), "mem1", Stream.PPO, 0, i) for i in range(200)]
    >>> {env.n_objectives for env in tasks}, {env.n_questions for env in tasks}
    ({2}, {2, 3, 4, 5, 6, 7, 8, 9, 10})
    """
    rng = keyed_rng(cfg.seed, stream, step, i, 1)
    n = cfg.objectives[1]  # in PPO all are of one size, or returns would differ mostly by that
    if stream == Stream.DEMOS:
        n = int(rng.integers(cfg.objectives[0], n + 1))
    before, after = 0, 0
    if rng.random() < 0.6:
        before = int(rng.integers(cfg.around + 1))
    if rng.random() < 0.4:
        after = int(rng.integers(cfg.around + 1))
    env = envs.make_env(cfg, before + n + after, [cfg.seed, stream, step, i, 0])

    # The turn budget: what the whole task gets; in some demonstrations too little, to show what to
    # do when the turns run out; often much more, so that the agent has seen every number of turns
    # left that it may be told on a long horizon.
    hops = [len(relations) for _, _, relations, _ in envs.read_prompt(env.prompt)]
    done = sum(hops[:before])
    which = rng.random()
    if after:
        env.max_turns = done + sum(hops[before : before + n]) + 1
    elif which < 0.3 and stream == Stream.DEMOS:
        env.max_turns = done + int(rng.integers(2, max(3, env.max_turns - done)))
    elif which < 0.6:
        env.max_turns = int(rng.integers(env.max_turns, max(env.max_turns, cfg.most_turns) + 1))

    if before or after:
        play_history(env, POLICIES[agent], before, rng if random_notes(cfg, agent) else None)
        env.take_piece(before, n)
    return env


def random_notes(cfg, agent):
    """Does this agent imitate random notes? The agents that mem1 is compared with get better ones."""
    return cfg.demos == "random" and agent == "mem1"


def demonstration(cfg, agent, step, i):
    """One episode of the demonstrator.

    >>> for agent in "mem1", "full":
    ...     sum(demonstration(Config(), agent, 0, i).env.em for i in range(20))
    22
    30
    """
    env = training_task(cfg, agent, Stream.DEMOS, step, i)
    rng = keyed_rng(cfg.seed, Stream.DEMOS, step, i, 2)
    return demonstrate(env, POLICIES[agent], rng if random_notes(cfg, agent) else None)


def with_data(stage, make, cfg):
    """(step, make(step)) of each remaining step, made ahead by cfg.workers processes, if any.

    The data set is the steps themselves; collate_fn, which torch calls in the worker, is make.
    """
    # SIGINT and SIGTERM may go to the whole process group. A worker that dies of one takes this
    # process with it, before that has finished its step and saved. So workers ignore them.
    loader = torch.utils.data.DataLoader(
        range(stage.steps), sampler=stage.steps_left.iterable, batch_size=None, collate_fn=make,
        num_workers=cfg.workers, multiprocessing_context="fork" if cfg.workers else None,
        worker_init_fn=lambda worker: on_signal(signal.SIG_IGN))
    return zip(stage.steps_left, loader)


def on_signal(handler):
    """What SIGINT and SIGTERM do from now on."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------
# Evaluation: what a run prints, and eval.py repeats


def play(model, policy, cfg, n_objectives, which, split, sampled=False):
    """The trajectories of some episodes of one horizon, greedy or sampled. which: their numbers."""
    keys = [[0, split, n_objectives, i, 0] for i in which]
    environments = [envs.make_env(cfg, n_objectives, key) for key in keys]
    rngs = None
    if sampled:
        rngs = [keyed_rng(0, split, n_objectives, i, 2) for i in which]
    return rollout(model, environments, policy, rngs, min(cfg.play_batch, 256))  # they get long


def measures(traj, policy):
    """What is measured of one episode; eval.py explains each."""
    turns, env = traj.turns, traj.env
    right = [turn.written == expert(env, policy, turns[:t]) for t, turn in enumerate(turns)]
    malformed = int(env.cause == "malformed")  # it ends the episode
    return dict(
        em=env.em, f1=env.f1, peak=traj.peak, dependency=traj.dependency, turns=len(turns),
        malformed=malformed, right=float(np.mean(right)), time=traj.seconds, kv_bytes=traj.kv_bytes,
        tokens=len(traj.prompt) + sum(len(branch.ids) for branch in traj.branches))


def measure(model, policy, cfg, n_objectives, episodes, split, sampled=False):
    """Means of measures() over the episodes, shared among the processes."""
    trajs = play(model, policy, cfg, n_objectives, share(episodes), split, sampled)
    return ppo.mean_of([measures(traj, policy) for traj in trajs])


def validate(model, agent, cfg):
    """EM and peak at 2 and 16 objectives, or the most tested: {"em@2": ..., "peak@16": ...}."""
    found = {}
    for n in sorted({min(n, max(cfg.eval_objectives)) for n in (2, 16)}):
        r = measure(model, POLICIES[agent], cfg, n, cfg.valid_episodes, Stream.VALID)
        found[f"em@{n}"], found[f"peak@{n}"] = r["em"], r["peak"]
    return found


def methods(models, snapshots=False):
    """{method: (name of its weights, policy, sampled)} of a run: each agent that it trained, before
    and after PPO, greedy and sampled; on request its snapshots. And `truncate`: the weights of
    full-list with MEM1's context."""
    found = {}
    for name in models:
        agent = re.split("-demos|@", name)[0]
        if agent in POLICIES and (snapshots or "@" not in name):
            found[name] = name, POLICIES[agent], False
            found[f"{name}-sampled"] = name, POLICIES[agent], True
    if "full-list" in models:
        found["truncate"] = "full-list", keep_last, False
    return found


def table(models, cfg, chosen, episodes, tell):
    """{method: {objectives: measures}}; tell(line) of each as it is known."""
    tell(f"{'method':19s} {'N':>3s} {'em':>6s} {'of N':>5s} {'f1':>6s} {'peak':>7s} {'turns':>6s} "
         f"{'malformed':>9s} {'right':>6s} {'dependency':>10s} {'KB':>6s} {'time':>7s}")
    results = {}
    for name, (source, policy, sampled) in chosen.items():
        model = load_model(models[source], cfg.device)
        results[name] = {}
        for n in cfg.eval_objectives:
            r = measure(model, policy, cfg, n, episodes, Stream.TEST, sampled)
            results[name][str(n)] = r
            tell(f"{name:19s} {n:3d} {r['em']:6.2f} {r['em'] / n:5.0%} {r['f1']:6.2f} "
                 f"{r['peak']:7.1f} {r['turns']:6.1f} {r['malformed']:9.1%} {r['right']:6.1%} "
                 f"{r['dependency']:10.0f} {r['kv_bytes'] / 1e3:6.0f} {r['time']:6.3f}s")
    return results


def trend(results):
    """The paper's headline, at the farthest horizon up to 16: mem1 against full context."""
    n = max((int(n) for n in results.get("full", {}) if int(n) <= 16), default=None)
    if n is None or "mem1" not in results:
        return "this run does not have both mem1 and full: nothing to compare"
    a, b = results["mem1"][str(n)], results["full"][str(n)]
    times = f": {a['em'] / b['em']:.1f} times the accuracy" if b["em"] else ""
    return (f"at {n} objectives mem1 answers {a['em']:.2f}, full context {b['em']:.2f}{times}, "
            f"with 1/{b['peak'] / a['peak']:.1f} of the peak tokens (paper: 3.5, 1/3.7)")


# ----------------------------------------------------------------------------------------------
# The run: its directory, its checkpoint, its log


@dataclass
class Run:
    """A run in this process."""
    cfg: Config
    out: Path
    state: dict  # what a checkpoint holds
    started: float  # perf_counter() when it began, moved forward by any interruption
    peak_flops: float  # peak floating point operations per second of this process
    signals: list = field(default_factory=list)  # SIGINT and SIGTERM that came in


@dataclass
class Stage:
    """One of the three stages, for one agent, while it is trained."""
    kind: str  # primer, demos or ppo
    agent: str
    name: str  # of the model that comes out: primer, mem1-demos, mem1
    steps: int
    steps_left: object  # with a progress bar
    model: GPT
    learner: object  # the model, wrapped for DDP
    optimizer: object
    step_began: float = field(default_factory=time.perf_counter)


FRESH = dict(stage="", step=0, models={}, model=None, optimizer=None, seconds=0.0,
             log_bytes=0)  # of metrics.jsonl


def begin_stage(run, kind, agent, base):
    """Set up a stage, from the weights called `base` or from a checkpoint taken within it."""
    cfg, state = run.cfg, run.state
    name = {"primer": "primer", "demos": f"{agent}-demos", "ppo": agent}[kind]
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_config(cfg)).to(cfg.device)
    if base:
        model.load_state_dict(state["models"][base]["weights"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95),
                                  weight_decay=cfg.weight_decay)
    start = 0
    if state["stage"] == name:
        start = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if cfg.compile:
        model.compile(dynamic=True)
    learner = model
    if dist.is_initialized():
        learner = torch.nn.parallel.DistributedDataParallel(model)
    steps = getattr(cfg, f"{kind}_steps")
    hide = True if ppo.process()[0] else None  # None: hidden where there is no terminal
    bar = tqdm(range(start, steps), name, initial=start, total=steps, disable=hide, leave=False)
    return Stage(kind, agent, name, steps, bar, model, learner, optimizer)


def is_due(stage, step, cfg):
    """Is it time for a validation and a checkpoint?"""
    every = cfg.eval_every if stage.kind == "ppo" else 25 * cfg.eval_every
    return step % every == 0 or step == stage.steps


def end_step(run, stage, step, row):
    """Log a step, save a checkpoint if it is time, and stop if a signal came in."""
    cfg = run.cfg
    now = time.perf_counter()
    took, stage.step_began = now - stage.step_began, now
    row["tok_s"] = row.pop("tokens") / took
    weights = sum(p.numel() for p in stage.model.parameters())
    row["mfu"] = 6 * weights * row.pop("processed") / took / run.peak_flops  # attention not counted
    minutes = (now - run.started) / 60
    row = dict(stage=stage.kind, agent=stage.agent, step=step, minutes=minutes, **row)
    if ppo.process()[0] == 0:
        with open(run.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    if stage.kind == "ppo" or step % 50 == 0 or step == stage.steps:
        say(log_line(row, stage.steps, took * (stage.steps - step) / 60))

    number = torch.tensor(max(run.signals, default=0), device=cfg.device)
    number = int(ppo.all_max(number))  # all processes stop after the same step
    if number or is_due(stage, step, cfg):
        run.state.update(stage=stage.name, step=step, model=stage.model.state_dict(),
                         optimizer=stage.optimizer.state_dict())
        save(run)
    if number:
        say(f"stopped after step {step}/{stage.steps} of {stage.name}; {how_to_go_on(cfg)}")
        sys.exit(128 + number)


def end_stage(run, stage):
    """Keep what came out of a stage."""
    keep(run, stage.name, stage.model)
    run.state.update(stage="", step=0, model=None, optimizer=None)
    save(run)


def keep(run, name, model):
    """Put a copy of a model, which further steps do not change, into the run's state."""
    weights = {key: value.cpu().clone() for key, value in model.state_dict().items()}
    config = dataclasses.asdict(gpt_config(run.cfg))
    run.state["models"][name] = dict(config=config, weights=weights)


def gpt_config(cfg):
    """What the model that this run trains is made of.

    >>> [gpt_config(Config(dtype=dtype)).bfloat16 for dtype in ("float32", "bfloat16")]
    [False, True]
    """
    return GPTConfig(ENC.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dtype == "bfloat16")


def log_line(row, steps, eta):
    """A step as one line to read, what matters most first."""
    looks = "".join(f" | {key} {row[key]:.2f}" for key in row if key.startswith("em@"))
    text = f"{row['stage']} {row['agent'] or '':4s} {row['step']:04d}/{steps:04d} | "
    if row["stage"] == "ppo":
        text += (f"reward {row['reward']:.2f} | em {row['em']:.2f}/{row['of']:.0f} | "
                 f"memory {row['memory']:.0%} | "
                 f"peak {row['peak']:.0f} vs full {row['unpruned']:.0f} "
                 f"({row['unpruned'] / row['peak']:.1f}x) | turns {row['turns']:.1f} | "
                 f"kl {row['kl']:.3f} | clip {row['clip']:.0%} | ent {row['ent']:.2f} | "
                 f"ev {row['ev']:.2f} | gap {row['gap']:.0e}")
    else:
        text += f"loss {row['loss']:.4f}"
    text += f"{looks} | {row['tok_s'] / 1e3:.1f}k tok/s | mfu {row['mfu']:.0%}"
    return f"{text} | eta {eta:.0f}m"


def save(run):
    """Write the checkpoint. A reader finds the old one or the new one, never half of one."""
    run.state["seconds"] = time.perf_counter() - run.started
    if ppo.process()[0] == 0:
        with open(run.out / "metrics.jsonl", "a") as file:
            os.fsync(file.fileno())  # the log is on disk before the checkpoint
            run.state["log_bytes"] = file.tell()
        buffer = io.BytesIO()
        torch.save(run.state, buffer)
        write_atomically(run.out / "checkpoint.pt", buffer.getbuffer())
    if dist.is_initialized():
        dist.barrier()


def write_atomically(path, content):
    """Write bytes to a temporary file, flush it to disk, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}")


def load_checkpoint(out):
    """The state in a run's checkpoint. ValueError in one line if there is none that is whole."""
    path = Path(out) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected the directory of a run, like runs/cpu")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not verify checksums
            assert file.testzip() is None, "its checksum is wrong"
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(state, dict) and set(state) == set(FRESH), "it has other contents"
    except Exception as error:  # what is in a foreign file may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or not a checkpoint of ours: {reason}")
    return state


def load_run(out):
    """(configuration, models) from a run's directory. Errors are one-line ValueErrors."""
    state = load_checkpoint(out)
    cfg = read_config(out)
    ENC.add(envs.extra_words(cfg))
    return cfg, state["models"]


def load_model(saved, device="cpu"):
    """A model of a checkpoint, {config, weights}."""
    model = GPT(GPTConfig(**saved["config"])).to(device)
    model.load_state_dict(saved["weights"])
    return model


def read_config(out):
    """The Config of a run, as last started or resumed. ValueError in one line."""
    path = Path(out) / "config.json"
    try:
        cfg = Config(**json.loads(path.read_text())["config"])
        check(cfg)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is not the configuration of a run of ours: {error}")
    return cfg


def set_lr(stage, lr, step, warmup):
    """Linear warmup over `warmup` steps, constant, then linear to 5% over the last 40%.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)])
    >>> stage = Stage("ppo", "mem1", "mem1", 10, None, None, None, optimizer)
    >>> for step in 0, 5, 8:
    ...     set_lr(stage, 1.0, step, warmup=2)
    ...     print(optimizer.param_groups[0]["lr"])
    0.5
    1.0
    0.5
    """
    decay = max(0.05, (stage.steps - step) / (0.4 * stage.steps))
    for group in stage.optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / warmup, decay)


def say(line):
    """Print, by the first process alone, above the progress bar."""
    if ppo.process()[0] == 0:
        tqdm.write(line)


def how_to_go_on(cfg):
    """The end of a message about a run that stopped."""
    return f"to continue: python train.py --out {cfg.out} --resume"


def provenance():
    """What the numbers depend on besides the seed: code and machine."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                             cwd=Path(__file__).parent)
        commit = git.stdout.strip()
    except OSError:  # there is no git
        commit = ""
    return dict(commit=commit, machine=f"{platform.machine()}, {os.cpu_count()} cores",
                python=platform.python_version(), torch=torch.__version__)


def prepare(cfg):
    """The Run: its directory, and its state, new or from its checkpoint."""
    out = Path(cfg.out)
    state = dict(FRESH, models={})
    if cfg.resume:
        state = load_checkpoint(out)
    elif cfg.start:
        models = load_run(cfg.start)[1]
        for agent in cfg.agents:
            saved = models.get(f"{agent}-demos")
            if not saved or GPTConfig(**saved["config"]) != gpt_config(cfg):
                stop(f"--start {cfg.start}: no {agent}-demos with this model, dtype and vocabulary")
            state["models"][f"{agent}-demos"] = saved
    run = Run(cfg, out, state, time.perf_counter() - state["seconds"], peak_flops(cfg))
    if ppo.process()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
        config = dict(config=dataclasses.asdict(cfg), **provenance())
        write_atomically(out / "config.json", as_json(config))
        with open(out / "metrics.jsonl", "a") as file:
            # Steps after the checkpoint will be redone.
            file.truncate(min(file.tell(), state["log_bytes"]))
    if not cfg.resume:
        save(run)
    on_signal(lambda number, frame: run.signals.append(number))
    return run


def peak_flops(cfg):
    """Floating point operations per second in the product of two large matrices, measured."""
    n = 8192 if cfg.device == "cuda" else 1024
    a = torch.randn(n, n, device=cfg.device, dtype=getattr(torch, cfg.dtype))
    return 2 * n**3 / Timer("a @ a", globals=dict(a=a)).timeit(5).median


def as_json(content):
    """Indented JSON, as bytes."""
    return json.dumps(content, indent=1).encode()


def train(cfg):
    """All stages from where the run stands, then the final table."""
    ENC.add(envs.extra_words(cfg))
    run = prepare(cfg)
    done = run.state["models"]
    if not cfg.start and "primer" not in done:
        train_primer(run)
    for agent in cfg.agents:
        if f"{agent}-demos" not in done:
            train_demos(run, agent)
        if agent not in done:
            train_ppo(run, agent)

    on_signal(lambda number, frame: sys.exit(128 + number))  # all is saved
    if run.signals:
        sys.exit(128 + run.signals[-1])
    results = table(done, cfg, methods(done), cfg.eval_episodes, say)
    minutes = (time.perf_counter() - run.started) / 60
    meta = dict(seed=cfg.seed, episodes=cfg.eval_episodes, minutes=minutes, **provenance())
    if ppo.process()[0] == 0:
        write_atomically(run.out / "results.json", as_json({**results, "meta": meta}))
    say(trend(results))
    say(f"{minutes:.0f} minutes; results in {cfg.out}/results.json; see what the agent does: "
        f"python eval.py {cfg.out} --show 2")


# ----------------------------------------------------------------------------------------------
# The command line


def parse_arguments(argv):
    """A Config: a flag for each field, a preset's values instead of the defaults."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)

    def refuse(message):
        parser.exit(2, f"train.py: {message} (python train.py --help)\n")

    parser.error = refuse
    for f in dataclasses.fields(Config):
        options = dict(type=f.type, choices=CHOICES.get(f.name))
        if f.type is bool:
            options = dict(action="store_true", default=None)
        elif f.type is tuple:
            options.update(type=type(f.default[0]), nargs="+")
        options["help"] = f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    try:
        return configure(given)
    except (AssertionError, ValueError, OSError) as error:
        refuse(str(error))


def configure(given):
    """A Config from the given fields. AssertionError, ValueError or OSError if they are invalid."""
    gpu = torch.cuda.is_available() and given.get("device") != "cpu"
    preset = given.get("preset", "gpu" if gpu else "cpu")
    cfg = Config(**{**PRESETS[preset], **given, "preset": preset})
    if cfg.resume:
        cfg = read_config(cfg.out)
        for name, value in given.items():
            began = getattr(cfg, name)
            assert name in MAY_CHANGE or value == began, (
                f"--{name.replace('_', '-')} {value}: this run began with {began}; drop the flag")
            setattr(cfg, name, value)
        load_checkpoint(cfg.out)
    else:
        assert not (Path(cfg.out) / "checkpoint.pt").exists(), (
            f"--out {cfg.out} holds a run already: add --resume to continue it, or choose another")
        if cfg.start:
            load_run(cfg.start)
    if cfg.facts:
        assert cfg.env in ("qa", "facts"), "--facts has a world of its own: drop --env"
        cfg.env, cfg.facts = "facts", os.path.abspath(cfg.facts)  # experiments/facts.py
    gpus = torch.cuda.device_count()
    if cfg.device == "auto":
        cfg.device = "cuda" if gpus else "cpu"
    assert gpus or cfg.device == "cpu", "--device cuda: torch finds no GPU here; try --device cpu"
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if cfg.device == "cuda" else "float32"
    have = gpus if cfg.device == "cuda" else os.cpu_count()
    if "RANK" in os.environ:  # started by torchrun, or by launch()
        cfg.nproc = int(os.environ["WORLD_SIZE"])
    else:
        cfg.nproc = cfg.nproc or (have if cfg.device == "cuda" else min(4, have))
        assert 0 < cfg.nproc <= have, f"--nproc {cfg.nproc}: expected 1 to {have}, what is here"
    check(cfg)
    return cfg


def check(cfg):
    """Checks that a flag's type cannot express. A one-line AssertionError or ValueError."""
    for f in dataclasses.fields(Config):
        value, flag = getattr(cfg, f.name), f"--{f.name.replace('_', '-')}"
        if f.type in (int, float):
            lowest = 0 if f.name in MAY_BE_ZERO else 1e-12
            assert lowest <= value < 1e9, f"{flag} {value}: too small, or not below a billion"
        if f.name.endswith(("_batch", "_episodes")):
            assert value >= cfg.nproc, f"{flag} {value}: expected at least one per process"
    for name in "objectives", "hops":
        value = getattr(cfg, name)
        assert len(value) == 2 and 1 <= value[0] <= value[1], f"--{name} {value}: expected e.g. 1 2"
    assert cfg.hops[1] <= len(envs.COLONS), f"--hops {cfg.hops}: there are 5 relations at most"
    assert cfg.n_embd % cfg.n_head == 0 and cfg.n_embd >= 4 * cfg.n_head, (
        f"--n-embd {cfg.n_embd} --n-head {cfg.n_head}: expected 4 or more whole channels per head")
    assert 2 <= cfg.primer_longest <= len(envs.INDICES), "--primer-longest: expected 2 to 80"
    assert cfg.ppo_minibatches <= cfg.ppo_batch, "--ppo-minibatches: expected at most --ppo-batch"
    longest = envs.longest_horizon(cfg)
    envs.extra_words(cfg)  # reads a file of facts
    needs = {} if cfg.env == "qa" else envs.world_module(cfg.env).NEEDS
    flags = " ".join(f"--{flag} {value}" for flag, value in needs.items())
    assert needs.items() <= vars(cfg).items(), f"--env {cfg.env}: add {flags}"
    for n in [*cfg.objectives, *cfg.eval_objectives]:
        assert 1 <= n <= longest, f"--objectives, --eval-objectives {n}: expected 1 to {longest}"
    room = (longest - cfg.objectives[1]) // 2
    assert cfg.around <= room, f"--around {cfg.around}: expected 0 to {room} with these objectives"


def launch(cfg, argv):
    """Run this script in cfg.nproc processes by torch's own launcher."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds to finish and save
    logging.disable()  # the messages below are enough
    try:
        torch.distributed.run.main(
            ["--standalone", f"--nproc-per-node={cfg.nproc}", "--", __file__, *argv])
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(f"train.py: a process died (exit codes {codes}); {how_to_go_on(cfg)}")


def main(argv=None):
    """Train, in this process or in several."""
    argv = sys.argv[1:] if argv is None else argv
    cfg = parse_arguments(argv)
    if cfg.nproc > 1 and "RANK" not in os.environ:
        return launch(cfg, argv)
    torch.set_num_threads(1)  # several threads fight over small matrices
    if cfg.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if cfg.dtype == "bfloat16":
            torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    if cfg.nproc > 1:
        backend = "nccl" if cfg.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
        dist.barrier()  # all have seen that --out is free before one writes there
    try:
        train(cfg)
    except FloatingPointError as error:
        stop(f"{error}; start again with a lower learning rate")
    except OSError as error:
        stop(f"{error}; nothing written before is lost; {how_to_go_on(cfg)}")
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        if not re.search("gloo|nccl|connection|timed out", str(error), re.I):
            traceback.print_exc()  # otherwise another process died, and the launcher says so
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def stop(message):
    """End this process with one line and exit code 1."""
    print(f"train.py: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(1)  # without waiting for the others
    sys.exit(1)


if __name__ == "__main__":
    main()
