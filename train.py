"""train.py: teach a small GPT to rewrite its memory: reading, imitation, reinforcement.

    python train.py                              # laptop: two agents, then the paper's trend
    python train.py --preset debug               # the smallest task, within a minute
    python train.py --device cuda --nproc 8      # 8 GPUs by DDP; --preset gpu: a larger model
    torchrun --nproc-per-node 8 train.py         # the same; several machines share --out
    python train.py --out runs/cpu --resume      # continue an interrupted run
    python train.py --start runs/cpu --seed 1 --out runs/again   # PPO only, from imitated agents

Three stages. Qwen2.5-7B, which the paper starts from, can read; a model from scratch cannot, hence
the first stage:
    primer   copying, editing, looking up, on random words. No environment. Shared by all agents
    demos    imitation: the format, how to search, how to carry on a list. mem1 imitates random
             notes (envs.random_notes), the others oracle notes
    ppo      reward: it teaches what is worth noting
In demos and ppo, most tasks are pieces of longer ones: see training_task().

Every random choice is keyed by (seed, stage, step, episode). So a resumed run repeats the
uninterrupted one (in one CPU process bit for bit), and any number of processes gets the same tasks.
"""
import argparse
import collections
import dataclasses
import datetime
import fcntl
import functools
import inspect
import io
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.run
from torch.distributed.elastic import multiprocessing as elastic
from torch.utils.data import DataLoader
from tqdm import tqdm

import envs
import ppo
from envs import Stream, keyed_rng
from eval import (Parser, load_checkpoint, load_model, methods, require, show_change, table, trend,
                  validate)
from mem1 import ENC, POLICIES, exercise, expert_rollout, make_rows, play_history
from model import GPT, GPTConfig
from ppo import rank, share


@dataclasses.dataclass
class Config:
    """All settings of a run; each field is a flag of the command line."""
    # run
    preset: str = "cpu"  # several of the fields below at once
    out: str = "runs/cpu"  # the run's directory; runs/PRESET unless given
    resume: bool = False  # continue from the checkpoint in --out
    start: str = ""  # a run to take the imitated agents from; only PPO is then run
    seed: int = 0  # of training; test episodes are the same for every seed
    device: str = "auto"  # auto: cuda where there is one
    nproc: int = 0  # processes; 0: one per GPU, or per CPU core (at most 4)
    dtype: str = "auto"  # of matrix products; auto: bfloat16 on a GPU, else float32
    workers: int = 0  # data-loading processes per training process (docker run needs --shm-size 8g)
    play_batch: int = 64  # episodes played side by side
    agents: tuple = ("mem1", "full")  # context policies to train an agent for, one after the other
    # world
    env: str = "qa"  # qa, or a world of experiments/: web, count, shop, cue
    objectives: tuple = (1, 2)  # fewest and most in demonstrations; PPO uses the most
    hops: tuple = (1, 2)  # fewest and most relations in a question
    around: int = 4  # L: most questions before the agent's own, and usually after; 0: whole tasks
    most_questions: int = 64  # in a training prompt; also sets the largest turn budget
    long_prompts: float = 0.1  # share of training tasks with any number of questions in the prompt
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
    demos_lr: float = 3e-3
    demos: str = "random"  # notes that mem1 imitates; the other agents imitate oracle notes
    # ppo
    ppo_steps: int = 60  # 0: imitation only
    ppo_batch: int = 128  # episodes per step
    ppo_epochs: int = 2
    ppo_minibatches: int = 2
    ppo_lr: float = 4e-4
    primer_coef: float = 0.3  # weight of the reading exercises beside each minibatch
    clip: float = 0.2  # of the ratio
    kl_coef: float = 0.01  # reward lost per nat of KL from the imitated policy
    gamma: float = 1.0
    lam: float = 1.0
    # optimisation
    grad_clip: float = 1.0
    weight_decay: float = 0.01
    micro_batch: int = 0  # tokens per forward pass; 0: 1024 (fits a CPU's cache), on a GPU 65536.
    #                       Out of memory: --resume with less of this or of play_batch
    # evaluation
    eval_every: int = 20  # PPO steps between validations, checkpoints; other stages: times 25
    eval_objectives: tuple = (1, 2, 4, 8, 16)  # horizons tested
    eval_episodes: int = 128  # per cell of the final table; eval.CELL_QUESTIONS may lower it
    valid_episodes: int = 64  # per validation


PRESETS = {
    "cpu": {},
    "debug": dict(
        env="cue", around=0, out="runs/debug", nproc=1, n_layer=2, n_embd=48, primer_steps=40,
        primer_longest=4, demos_steps=100, demos_batch=16, exercises=8, ppo_steps=20, ppo_batch=64,
        eval_every=10, eval_objectives=(1, 2), eval_episodes=32, valid_episodes=16),
    "gpu": dict(
        out="runs/gpu", workers=8, play_batch=1024, n_layer=8, n_embd=512, n_head=8,
        primer_steps=4000, primer_batch=1024, primer_lr=1e-3, demos_steps=4000, demos_batch=512,
        demos_lr=5e-4, exercises=256, ppo_steps=200, ppo_batch=1024, ppo_lr=1e-4, eval_every=50,
        eval_objectives=(1, 2, 4, 8, 16, 32, 64), eval_episodes=1024, valid_episodes=256),
}
CHOICES = dict(preset=[*PRESETS], agents=[*POLICIES], demos=["random", "oracle"],
               device=["auto", "cpu", "cuda"], dtype=["auto", "float32", "bfloat16"])
COMMAND = "train.py"  # to resume by; experiments/ set their own
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # each ends a run
LOST = 3  # exit code of a process that lost another one
MAY_CHANGE = "out resume device nproc workers play_batch micro_batch".split()  # on --resume
# Flags not listed here: from 1 (integers) or 0 (floats) to a billion.
LOWEST = dict(seed=0, nproc=0, workers=0, micro_batch=0, exercises=0, around=0, ppo_steps=0,
              primer_longest=2, grad_clip=1e-9, primer_lr=1e-9, demos_lr=1e-9, ppo_lr=1e-9)
HIGHEST = dict(gamma=1, lam=1, clip=0.99, long_prompts=1, primer_lr=1, demos_lr=1, ppo_lr=1,
               primer_longest=len(envs.INDICES), hops=len(envs.COLONS), workers=4 * os.cpu_count())
Stage = collections.namedtuple("Stage", "kind agent name base")  # base: the model it starts from

# --- Training


def train_stage(run, kind, agent, name, base):
    """Train model `name` from where the run stands, beginning with the weights of `base`, if any.

    Keeps the last weights, since choosing by em@16 would tune on an untrained horizon.
    """
    cfg, state = run.cfg, run.state
    steps, lr = getattr(cfg, f"{kind}_steps"), getattr(cfg, f"{kind}_lr")

    # 1. The model and its optimizer, new or as they were within this stage.
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
    learner = model
    if dist.is_initialized():
        learner = torch.nn.parallel.DistributedDataParallel(model)
    if kind == "ppo":
        reference = load_model(state["models"][base], cfg.device).requires_grad_(False)

    # 2. The steps that are left.
    began = time.perf_counter()
    for step, data in steps_left(cfg, kind, agent, range(start, steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, steps, warmup=3 if kind == "ppo" else 50)
        if kind == "ppo":
            stats = ppo.update(learner, optimizer, reference, data, POLICIES[agent], cfg, step)
        else:
            stats = imitate(learner, optimizer, data, cfg)
        step += 1
        stats["tok_s"] = stats.pop("tokens") / (time.perf_counter() - began)

        every = cfg.eval_every if kind == "ppo" else 25 * cfg.eval_every
        is_due = step % every == 0 or step == steps
        if is_due and agent:
            stats.update(validate(model, agent, cfg))
        log(run, kind, agent, step, stats)
        # All processes stop after the same step.
        stop = torch.tensor(run.signal, device=cfg.device)
        stop = int(ppo.all_reduce(stop, dist.ReduceOp.MAX))
        if stop or is_due:
            state.update(stage=name, step=step, model=model.state_dict(),
                         optimizer=optimizer.state_dict())
            save(run)
        if stop:
            print0(f"stopped after step {step}/{steps} of {name}; {resume_hint(cfg)}")
            sys.exit(128 + stop)
        began = time.perf_counter()

    # 3. Keep the model.
    weights = {key: value.cpu() for key, value in model.state_dict().items()}
    state["models"][name] = dict(config=vars(model.config), weights=weights)
    state.update(stage="", step=0, model=None, optimizer=None)
    save(run)


def gpt_config(cfg):
    """The GPTConfig of this run."""
    return GPTConfig(ENC.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dtype == "bfloat16")


def imitate(learner, optimizer, batch, cfg):
    """One step of maximum likelihood on exercises and demonstrations. Returns what to log."""
    n = ppo.token_count(batch, cfg.device)
    total = torch.zeros((), device=cfg.device)
    optimizer.zero_grad()
    for rows in batch:
        with ppo.no_sync(learner, unless=rows is batch[-1]):
            nll = ppo.nll(learner, rows.to(cfg.device))
            ppo.backward(nll / n)
        total += nll.detach()
    norm = ppo.clip_and_step(learner, optimizer, cfg.grad_clip)
    return dict(loss=(ppo.all_reduce(total) / n).item(), norm=norm, tokens=int(n))


def lr_factor(step, steps, warmup):
    """Linear warmup over `warmup` steps, constant, then falling over the last 40%, down to 5%.

    >>> [lr_factor(step, 10, warmup=2) for step in (0, 5, 8)]
    [0.5, 1.0, 0.5]
    """
    return min(1.0, (step + 1) / warmup, max(0.05, (steps - step) / (0.4 * steps)))


# --- Data


def step_data(cfg, kind, agent, step):
    """Make this process's data for a step of a stage: Rows; for PPO, environments."""
    if kind == "ppo":
        return [training_task(cfg, agent, Stream.PPO, step, i) for i in share(cfg.ppo_batch)]
    if kind == "primer":
        ramp = min(1.0, step / (0.6 * cfg.primer_steps))
        longest = round(2 + ramp * (cfg.primer_longest - 2))
        trajs = [exercise(cfg, step, i, longest) for i in share(cfg.primer_batch)]
    else:
        trajs = ppo.exercises(cfg, step)
        trajs += [demonstration(cfg, agent, step, i) for i in share(cfg.demos_batch)]
    return make_rows(trajs, cfg.micro_batch)


def steps_left(cfg, kind, agent, numbers):
    """(step, its data) for these steps, made ahead by cfg.workers processes, if any."""
    # Workers ignore signals, or they would end this process before it has saved.
    loader = DataLoader(
        numbers, batch_size=None, collate_fn=functools.partial(step_data, cfg, kind, agent),
        num_workers=cfg.workers, worker_init_fn=lambda worker: on_signal(signal.SIG_IGN),
        multiprocessing_context="fork" if cfg.workers else None)
    bar = tqdm(numbers, kind, numbers.stop, leave=False, initial=numbers.start,
               disable=rank() > 0 or None)  # None: hidden where there is no terminal
    return zip(bar, loader)


def on_signal(handler):
    """Call `handler` on SIGINT, SIGTERM and SIGHUP, unless they are ignored, as under nohup."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def training_task(cfg, agent, stream, step, i):
    """The environment of one episode: most of the time a piece of a longer task.

    The prompt has before + n + after questions. The demonstrator has played the first ones under
    this agent's policy and notes (env.history). The agent is scored on the next n only; if more
    follow, its turns run out there (in web later, as a hop often takes fewer turns than allowed).
    cfg.around bounds what to remember, cfg.most_questions the prompt:

    >>> tasks = [training_task(Config(), "mem1", Stream.PPO, 0, i) for i in range(200)]
    >>> {env.n_objectives for env in tasks}, max(env.n_questions for env in tasks)
    ({2}, 61)
    """
    rng = keyed_rng(cfg.seed, stream, step, i, 1)
    n = cfg.objectives[1]  # PPO: one size, or returns would vary mostly with n
    if stream == Stream.DEMOS:
        n = int(rng.integers(cfg.objectives[0], n + 1))
    before, after = 0, 0  # at L = cfg.around = 4, 0.6 x 4/5 of the tasks begin in the middle
    if rng.random() < 0.6:
        before = int(rng.integers(cfg.around + 1))
    if rng.random() < 0.4:
        after = int(rng.integers(cfg.around + 1))
    if cfg.around and rng.random() < cfg.long_prompts:
        most = min(cfg.most_questions, envs.longest_horizon(cfg))
        after = int(rng.integers(most - before - n + 1))
    env = envs.world(cfg.env)(before + n + after, cfg.hops, [cfg.seed, stream, step, i, 0])

    # The turn budget. If questions follow: turns_per_hop for each hop of the agent's own. Else the
    # whole task's; in some demonstrations less, to show what to do then; often more, to show every
    # "left=".
    questions = envs.read_questions(env.prompt)
    needed = [len(relations) * env.turns_per_hop for _, _, relations, _ in questions]
    played = sum(needed[:before])  # turns allowed for the history
    draw = rng.random()
    if after:
        env.max_turns = played + sum(needed[before : before + n]) + 1
    elif draw < 0.3 and stream == Stream.DEMOS:
        env.max_turns = played + int(rng.integers(2, max(3, env.max_turns - played)))
    elif draw < 0.6:
        largest = max(env.max_turns, cfg.hops[1] * cfg.most_questions + 2)
        env.max_turns = int(rng.integers(env.max_turns, largest + 1))

    if before or after:
        play_history(env, POLICIES[agent], before, notes_rng(cfg, agent, rng))
        env.take_piece(before, n)
    return env


def notes_rng(cfg, agent, rng):
    """rng if this agent imitates random notes, else None: oracle notes, for strong baselines."""
    return rng if cfg.demos == "random" and agent == "mem1" else None


def demonstration(cfg, agent, step, i):
    """One episode of the demonstrator."""
    env = training_task(cfg, agent, Stream.DEMOS, step, i)
    rng = keyed_rng(cfg.seed, Stream.DEMOS, step, i, 2)
    return expert_rollout(env, POLICIES[agent], notes_rng(cfg, agent, rng))


# --- The run: its directory, its checkpoint, its log


@dataclasses.dataclass(repr=False)  # signal.getsignal() would format all weights
class Run:
    cfg: Config
    state: dict  # what a checkpoint holds
    started: float  # perf_counter() when it began, moved forward by any interruption
    signal: int = 0  # the one that asked it to stop
    signal_time: float = 0.0

    def stop_later(self, number, frame):
        """On a signal: finish the step and save. On another, over 1 s later: end at once."""
        if not self.signal:
            self.signal, self.signal_time = number, time.perf_counter()
        elif time.perf_counter() > self.signal_time + 1:  # the launcher may forward the same one
            os._exit(128 + number)

    @property
    def log_path(self):
        return Path(self.cfg.out) / "metrics.jsonl"


def stages(cfg):
    """The stages of a run."""
    found = [Stage("primer", None, "primer", None)]
    for agent in cfg.agents:
        found.append(Stage("demos", agent, f"{agent}-demos", "primer"))
        if cfg.ppo_steps:
            found.append(Stage("ppo", agent, agent, f"{agent}-demos"))
    return [stage for stage in found if stage.kind == "ppo" or not cfg.start]


def log(run, kind, agent, step, stats):
    """Append a step to metrics.jsonl; print every step of PPO, else every 50th and the last."""
    minutes = (time.perf_counter() - run.started) / 60
    stats = dict(stage=kind, agent=agent, step=step, minutes=minutes, **stats)
    if rank() == 0:
        with open(run.log_path, "a") as file:
            file.write(json.dumps(stats) + "\n")
    steps = getattr(run.cfg, f"{kind}_steps")
    if kind != "ppo" and step % 50 and step < steps:
        return
    parts = [f"{kind} {agent or '':4s} {step:04d}/{steps:04d}"]
    if kind == "ppo":  # what matters most comes first
        form = ("reward {reward:.2f} | em {em:.2f}/{of:.0f} | memory {memory:.0%} | "
                "peak {peak:.0f} vs full {unpruned:.0f} ({times:.1f}x) | turns {turns:.1f} | "
                "kl {kl:.3f} | ref {ref:.3f} | clip {clip:.0%} | ent {ent:.2f} | ev {ev:.2f} | "
                "gap {gap:.0e}")
        parts.append(form.format(**stats, times=stats["unpruned"] / stats["peak"]))
    else:
        parts.append(f"loss {stats['loss']:.4f}")
    parts += [f"{key} {stats[key]:.2f}" for key in stats if key.startswith("em@")]
    eta = minutes_left(run.cfg, kind, agent, step, minutes)
    print0(" | ".join([*parts, f"{stats['tok_s'] / 1e3:.1f}k tok/s", f"eta {eta:.0f}m"]))


def minutes_left(cfg, kind, agent, step, minutes):
    """Minutes to the end of all stages, without the final table. A step of PPO usually takes as
    long as 10 of imitation or 20 of the primer."""
    cost = dict(primer=0.5, demos=1.0, ppo=10.0)
    done, total = 0.0, 0.0
    for stage in stages(cfg):
        if (stage.kind, stage.agent) == (kind, agent):
            done = total + cost[kind] * step
        total += cost[stage.kind] * getattr(cfg, f"{stage.kind}_steps")
    return minutes * (total - done) / done


def save(run):
    """Write the checkpoint. A reader finds the old one or the new one, never half of one."""
    run.state["seconds"] = time.perf_counter() - run.started
    if rank() == 0:
        with open(run.log_path, "a") as file:
            os.fsync(file.fileno())  # the log is on disk before the checkpoint
            run.state["log_bytes"] = file.tell()
        buffer = io.BytesIO()  # torch.save() reports a full disk as something else
        torch.save(run.state, buffer)
        write_atomically(Path(run.cfg.out) / "checkpoint.pt", buffer.getbuffer())
    if dist.is_initialized():
        dist.barrier()


def write_atomically(path, content):
    """Write bytes to a temporary file, flush it to disk, then rename it."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def print0(line):
    """Print, by the first process alone, above the progress bar."""
    if rank() == 0:
        tqdm.write(line)
        sys.stdout.flush()  # or a log file lags behind, and os._exit() drops its end


def resume_hint(cfg):
    """How to continue a run that stopped."""
    return f"to continue: python {COMMAND} --out {shlex.quote(cfg.out)} --resume"


def commit():
    """The commit of this code, with `+` if files differ from it; empty if it is no repository."""
    command = "git --git-dir=.git --work-tree=. describe --always --abbrev=40 --exclude=* --dirty=+"
    try:
        return subprocess.run(command.split(), cwd=Path(__file__).resolve().parent, text=True,
                              capture_output=True).stdout.strip()
    except OSError:  # there is no git
        return ""


def locked(out):
    """The lock of a run's directory, an open file: until it is closed, no other run can write."""
    Path(out).mkdir(parents=True, exist_ok=True)
    file = open(Path(out) / "lock", "w")
    if rank() == 0:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{out}: another process is writing this run")
    return file


def train(cfg):
    """All stages from where the run stands, then the final table."""
    ENC.add(envs.world(cfg.env).extra_words)
    # stage: name of the model in training; model: its weights so far
    state = dict(models={}, stage="", step=0, model=None, optimizer=None, seconds=0.0, log_bytes=0)
    if cfg.resume:
        state = load_checkpoint(cfg.out)
    elif cfg.start:
        imitated = load_checkpoint(cfg.start)["models"]
        state["models"] = {stage.base: imitated[stage.base] for stage in stages(cfg)}
    models = state["models"]
    state.update(config=vars(cfg), commit=commit())
    run = Run(cfg, state, time.perf_counter() - state["seconds"])
    if rank() == 0:
        with open(run.log_path, "a") as file:  # steps after the checkpoint will be redone
            file.truncate(min(file.tell(), state["log_bytes"]))
    if not cfg.resume:
        save(run)

    on_signal(run.stop_later)
    for stage in stages(cfg):
        if stage.name not in models:
            train_stage(run, *stage)

    on_signal(lambda number, frame: sys.exit(128 + number))  # all is saved
    if run.signal:
        sys.exit(128 + run.signal)
    trained = {stage.name: models[stage.name] for stage in stages(cfg)}
    results = table(trained, cfg, methods(trained), cfg.eval_episodes, print0)
    minutes = (time.perf_counter() - run.started) / 60
    meta = dict(seed=cfg.seed, minutes=minutes, commit=state["commit"], torch=torch.__version__)
    if rank() == 0:
        text = json.dumps({**results, "meta": meta}, indent=1)
        write_atomically(Path(cfg.out) / "results.json", text.encode())
        if {"mem1", "mem1-demos"} <= set(models):
            show_change(models, cfg)
        print(trend(results))
        print(f"{minutes:.0f} min; results in {cfg.out}/results.json; see what the agent does: "
              f"python eval.py {shlex.quote(cfg.out)} --show 2")


# --- The command line


def parse_arguments(argv):
    """A Config: a flag for each field, a preset's values instead of the defaults."""
    parser = Parser(f"{__doc__}\nThe flags (--n-embd for n_embd):\n\n{inspect.getsource(Config)}")
    for f in dataclasses.fields(Config):
        options = dict(type=f.type, choices=CHOICES.get(f.name))
        if f.type is bool:
            options = dict(action="store_true")
        elif f.type is tuple:
            options.update(type=type(f.default[0]), nargs="+")
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(argv))
    try:
        return configure(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def flag(name):
    """n_embd -> --n-embd"""
    return "--" + name.replace("_", "-")


def configure(given):
    """A Config from the given fields. An error in one line if they are invalid."""
    cfg = Config(**{**PRESETS[given.get("preset", "cpu")], **given})
    require(cfg.out, "--out: expected a directory")
    source = cfg.start
    if cfg.resume:
        source = cfg.out
        for name in given:
            require(name in MAY_CHANGE, f"{flag(name)}: cannot change on --resume; drop the flag")
    if source:
        state = load_checkpoint(source)
    if cfg.resume:
        config = state["config"]
        require(set(config) == set(vars(cfg)), f"--out {cfg.out}: saved by another train.py")
        cfg = Config(**{**config, "out": cfg.out, **given})
    else:
        require(not (Path(cfg.out) / "checkpoint.pt").exists(),
                f"--out {cfg.out} holds a run already: add --resume, or choose another")

    gpus = 0 if cfg.device == "cpu" else torch.cuda.device_count()
    if cfg.device == "auto":
        cfg.device = "cuda" if gpus else "cpu"
    require(gpus or cfg.device == "cpu", "--device cuda: torch finds no GPU here; try --device cpu")
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if gpus else "float32"
    cfg.micro_batch = cfg.micro_batch or (65536 if gpus else 1024)
    available = gpus or os.cpu_count()
    if dist.is_torchelastic_launched():  # by torchrun, or by launch()
        cfg.nproc = int(os.environ["WORLD_SIZE"])
        require(cfg.device == "cpu" or int(os.environ["LOCAL_WORLD_SIZE"]) <= gpus,
                f"expected at most {gpus} processes on this machine, one per GPU")
    else:
        cfg.nproc = cfg.nproc or gpus or min(4, available)
        require(cfg.nproc <= available, f"--nproc {cfg.nproc}: expected 1 to {available}")
    check(cfg)

    # Do the models to continue from fit?
    if source:
        ENC.add(envs.world(cfg.env).extra_words)
        models = state["models"]
        needed = models if cfg.resume else [stage.base for stage in stages(cfg)]
        for name in needed:
            fits = name in models and models[name]["config"] == vars(gpt_config(cfg))
            require(fits, f"{source}: no {name} of this size, dtype and vocabulary")
    return cfg


def check(cfg):
    """Range and consistency checks beyond the flags' types. ValueError in one line."""
    for name, value in vars(cfg).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        for one in values:
            if type(one) in (int, float):
                lowest = LOWEST.get(name, 1 if type(one) is int else 0)
                highest = HIGHEST.get(name, 1e9)
                require(lowest <= one <= highest,
                        f"{flag(name)} {one}: expected {lowest} to {highest:g}")
    for name in "primer_batch demos_batch ppo_batch eval_episodes valid_episodes".split():
        value = getattr(cfg, name)
        require(value >= cfg.nproc, f"{flag(name)} {value}: expected one per process or more")
    for name in "objectives", "hops":
        value = getattr(cfg, name)
        require(len(value) == 2 and value[0] <= value[1], f"--{name} {value}: expected e.g. 1 2")
    require(len(set(cfg.agents)) == len(cfg.agents), "--agents: expected each once")
    require(cfg.n_embd % cfg.n_head == 0 and cfg.n_embd >= 4 * cfg.n_head,
            f"--n-embd {cfg.n_embd} --n-head {cfg.n_head}: expected 4 or more channels per head")
    require(cfg.ppo_steps or not cfg.start, "--start: PPO only, so not with --ppo-steps 0")
    require(cfg.ppo_minibatches <= cfg.ppo_batch, "--ppo-minibatches: expected at most --ppo-batch")
    longest = envs.longest_horizon(cfg)
    for name, value in envs.world(cfg.env).needs.items():
        require(getattr(cfg, name) == value, f"--env {cfg.env}: add {flag(name)} {value}")
    require(max(*cfg.objectives, *cfg.eval_objectives) <= longest,
            f"--objectives, --eval-objectives: expected 1 to {longest}")
    room = max(0, min(longest, cfg.most_questions) - cfg.objectives[1])
    require(2 * cfg.around <= room,
            f"--around {cfg.around}: expected 0 to {room // 2}; see --most-questions")


def launch(cfg, argv):
    """Run this script in cfg.nproc processes by torch's own launcher."""
    logging.disable()  # the messages below are enough
    # The launcher would handle even ignored signals.
    heeded = [number.name for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    try:
        torch.distributed.run.main(  # 120 seconds to finish and save
            ["--standalone", f"--nproc-per-node={cfg.nproc}", "--shutdown-timeout=120",
             f"--signals-to-handle={','.join(heeded)}", "--", __file__, *argv])
    except elastic.api.SignalException as error:
        on_signal(signal.SIG_IGN)  # all is saved; a second one would only interrupt the clean-up
        sys.exit(128 + error.sigval)
    except elastic.errors.ChildFailedError as error:
        codes = sorted({failure.exitcode for failure in error.failures.values()})
        said_why = [code for code in codes if 0 < code < LOST]
        if said_why:
            sys.exit(said_why[0])  # the launcher ended the others
        sys.exit(f"train.py: a process died (exit codes {codes}); {resume_hint(cfg)}")


def main(argv):
    """Train, in this process or in several."""
    cfg = parse_arguments(argv)
    if cfg.nproc > 1 and not dist.is_torchelastic_launched():
        return launch(cfg, argv)
    torch.set_num_threads(1)  # several threads fight over small matrices
    if cfg.nproc > 1:
        backend = "gloo"
        if cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    try:
        if dist.is_initialized():
            dist.barrier()  # all have seen that --out is free before one writes there
        with locked(cfg.out):
            train(cfg)
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        diverged = isinstance(error, FloatingPointError)  # in all processes
        can_resume = not diverged and (Path(cfg.out) / "checkpoint.pt").exists()
        hint = f"; {resume_hint(cfg)}" if can_resume else ""
        if rank() == 0 or not diverged:
            print(f"train.py: {error}{hint}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(1)  # without waiting for the others
        sys.exit(1)
    except RuntimeError as error:
        if "gloo/transport" not in str(error):  # else another process is gone
            if not isinstance(error, dist.DistError):
                raise
            print(f"train.py: {error}", file=sys.stderr, flush=True)  # NCCL's reason
        os._exit(LOST)  # the launcher says so
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
