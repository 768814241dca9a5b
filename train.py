"""train.py: teach a small GPT to work in constant memory: reading, imitation, reinforcement.

    python train.py                              # laptop: two agents, then the trend of the paper
    python train.py --preset debug               # the smallest task, within a minute
    python train.py --device cuda --nproc 8      # 8 GPUs by DDP; --preset gpu: a larger model
    torchrun --nproc-per-node 8 train.py         # the same; also on several machines
    python train.py --out runs/cpu --resume      # continue an interrupted run
    python train.py --start runs/cpu --seed 1 --out runs/again   # PPO only, from imitated agents

Three stages. Qwen2.5-7B, which the paper starts from, can read; random weights
cannot, hence the first stage:
    primer   copying, editing, looking up, on random words. No environment. Shared by all agents
    demos    imitation, on one and two objectives: the format, how to search, how to carry on a
             list. The notes that mem1 imitates are random (envs.random_notes)
    ppo      reward, on two objectives: that answers are worth noting down
In the last two, most tasks are pieces of longer ones: see training_task(). The agent `mem1` prunes
its context, the agent `full` keeps everything. Besides, `full` imitates oracle notes, which serve
it better, and lists only new answers, since old ones stay in view.

Every random choice is keyed by (seed, stage, step, episode). So a resumed run repeats an
uninterrupted one bit for bit, and any number of processes plays the same episodes.
"""
import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import inspect
import io
import json
import logging
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import envs
import ppo
from envs import Stream, keyed_rng
from eval import (load_checkpoint, load_config, load_model, load_run, methods, show_change, table,
                  trend, validate)
from mem1 import ENC, POLICIES, exercise, expert_rollout, make_rows, play_history
from model import GPT, GPTConfig
from ppo import share


@dataclass
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
    around: int = 4  # most questions before the agent's own in training; 0: whole tasks
    most_questions: int = 64  # in a training prompt, and what the largest turn budget is for
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
    ppo_steps: int = 60
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
    micro_batch: int = 1024  # tokens (not rows) per forward pass: what fits a CPU core's cache
    # evaluation
    eval_every: int = 20  # ppo steps between validations and checkpoints; in other stages 25 times
    eval_objectives: tuple = (1, 2, 4, 8, 16)  # horizons tested
    eval_episodes: int = 128  # per cell of the final table
    valid_episodes: int = 64  # per validation


PRESETS = {
    "cpu": {},
    "debug": dict(
        env="cue", around=0, out="runs/debug", nproc=1, n_layer=2, n_embd=48, primer_steps=40,
        primer_longest=4, demos_steps=100, demos_batch=16, exercises=8, ppo_steps=20, ppo_batch=64,
        eval_every=10, eval_objectives=(1, 2), eval_episodes=32, valid_episodes=16),
    "gpu": dict(
        out="runs/gpu", workers=12, play_batch=1024, n_layer=8, n_embd=512, n_head=8,
        primer_steps=4000, primer_batch=1024, primer_lr=1e-3, demos_steps=4000, demos_batch=512,
        demos_lr=5e-4, exercises=256, ppo_steps=200, ppo_batch=1024, ppo_lr=1e-4, micro_batch=65536,
        eval_every=50,
        eval_objectives=(1, 2, 4, 8, 16, 32, 64), eval_episodes=1024, valid_episodes=256),
}
CHOICES = dict(preset=[*PRESETS], device=["auto", "cpu", "cuda"],
               dtype=["auto", "float32", "bfloat16"], agents=[*POLICIES],
               demos=["random", "oracle"])
MAY_CHANGE = "out resume device nproc".split()  # on --resume
MAY_BE_ZERO = "seed nproc workers exercises around".split()  # of those that are integers
HIGHEST = dict(gamma=1, lam=1, clip=0.99, primer_lr=1, demos_lr=1, ppo_lr=1,
               primer_longest=len(envs.INDICES), workers=4 * os.cpu_count())

# ----------------------------------------------------------------------------------------------
# Training


def train_stage(run, kind, agent):
    """Train one model from where the run stands: the primer, an imitating agent, or its PPO.

    The last weights are the result: choosing by validation at 16 objectives would use a horizon
    that is not trained.
    """
    cfg, state = run.cfg, run.state
    name, base = model_names(kind, agent)
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
        set_lr(optimizer, lr, step, steps, warmup=3 if kind == "ppo" else 50)
        if kind == "ppo":
            row = ppo.update(learner, optimizer, reference, data, POLICIES[agent], cfg, step)
        else:
            row = imitate(learner, optimizer, data, cfg)
        step += 1
        row["tok_s"] = row.pop("tokens") / (time.perf_counter() - began)

        every = cfg.eval_every if kind == "ppo" else 25 * cfg.eval_every
        is_due = step % every == 0 or step == steps
        if is_due and agent:
            row.update(validate(model, agent, cfg))
        log(run, kind, agent, step, row)
        number = torch.tensor(max(run.signals, default=0), device=cfg.device)
        number = int(ppo.all_max(number))  # all processes stop after the same step
        if number or is_due:
            state.update(stage=name, step=step, model=model.state_dict(),
                         optimizer=optimizer.state_dict())
            save(run)
        if number:
            print0(f"stopped after step {step}/{steps} of {name}; {resume_hint(cfg)}")
            sys.exit(128 + number)
        began = time.perf_counter()

    # 3. Keep a copy of the model.
    weights = {key: value.cpu().clone() for key, value in model.state_dict().items()}
    state["models"][name] = dict(config=dataclasses.asdict(gpt_config(cfg)), weights=weights)
    state.update(stage="", step=0, model=None, optimizer=None)
    save(run)


def model_names(kind, agent):
    """What the model that comes out of a stage is called, and the one that it begins with."""
    return {"primer": ("primer", None),
            "demos": (f"{agent}-demos", "primer"),
            "ppo": (agent, f"{agent}-demos")}[kind]


def gpt_config(cfg):
    """What the model that this run trains is made of.

    >>> [gpt_config(Config(dtype=dtype)).bfloat16 for dtype in ("float32", "bfloat16")]
    [False, True]
    """
    return GPTConfig(ENC.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dtype == "bfloat16")


def imitate(learner, optimizer, batch, cfg):
    """One step of maximum likelihood on the Rows of exercises and demonstrations. Returns what to
    log."""
    n = ppo.token_count(batch, cfg.device)
    total = torch.zeros((), device=cfg.device)
    optimizer.zero_grad()
    for rows in batch:
        with ppo.no_sync(learner, unless=rows is batch[-1]):
            nll = ppo.nll(learner, rows.to(cfg.device))
            ppo.backward(nll / n)
        total += nll.detach()
    norm = ppo.clip_and_step(learner, optimizer, cfg.grad_clip)
    return dict(loss=(ppo.all_sum(total) / n).item(), norm=norm, tokens=int(n))


def set_lr(optimizer, lr, step, steps, warmup):
    """Linear warmup over `warmup` steps, constant, then linear to 5% over the last 40%.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)])
    >>> for step in 0, 5, 8:
    ...     set_lr(optimizer, 1.0, step, 10, warmup=2)
    ...     print(optimizer.param_groups[0]["lr"])
    0.5
    1.0
    0.5
    """
    decay = max(0.05, (steps - step) / (0.4 * steps))
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (step + 1) / warmup, decay)


# ----------------------------------------------------------------------------------------------
# Data


class Steps(Dataset):
    """Item i is what step i of a stage trains on, in this process: Rows, or in PPO environments."""

    def __init__(self, cfg, kind, agent):
        self.cfg, self.kind, self.agent = cfg, kind, agent

    def __getitem__(self, step):
        cfg = self.cfg
        if self.kind == "ppo":
            which = share(cfg.ppo_batch)
            return [training_task(cfg, self.agent, Stream.PPO, step, i) for i in which]
        if self.kind == "primer":
            ramp = min(1.0, step / (0.6 * cfg.primer_steps))
            longest = round(2 + ramp * (cfg.primer_longest - 2))
            trajs = [exercise(cfg, step, i, longest) for i in share(cfg.primer_batch)]
        else:  # the exercises go on where the primer ended
            key = cfg.primer_steps + step
            trajs = [exercise(cfg, key, i, cfg.primer_longest) for i in share(cfg.exercises)]
            which = share(cfg.demos_batch)
            trajs += [demonstration(cfg, self.agent, step, i) for i in which]
        return make_rows(trajs, cfg.micro_batch)


def steps_left(cfg, kind, agent, numbers):
    """(step, its data) for these steps, made ahead by cfg.workers processes, if any."""
    # A signal may go to the whole process group. A worker that dies of it takes this process with
    # it, before that has finished its step and saved. So workers ignore signals.
    loader = DataLoader(
        Steps(cfg, kind, agent), batch_size=None, sampler=numbers,
        num_workers=cfg.workers, worker_init_fn=ignore_signals,
        multiprocessing_context="fork" if cfg.workers else None)
    hide = True if ppo.process()[0] else None  # None: hidden where there is no terminal
    bar = tqdm(numbers, kind, numbers.stop, leave=False, initial=numbers.start, disable=hide)
    return zip(bar, loader)


def ignore_signals(worker):
    """Called in each data-loading process as it starts."""
    on_signal(signal.SIG_IGN)


def on_signal(handler):
    """What SIGINT, SIGTERM and SIGHUP do from now on."""
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, handler)


def training_task(cfg, agent, stream, step, i):
    """The environment of one episode: most of the time a piece of a longer task.

    before + n + after questions stand in the prompt. The demonstrator has dealt with the first,
    under this agent's context policy and with its kind of notes; that is env.history. The agent is
    scored on the next n alone. If questions come after, the turns run out. So cfg.around bounds the
    answers to be remembered, and cfg.most_questions the prompt:

    >>> tasks = [training_task(Config(), "mem1", Stream.PPO, 0, i) for i in range(200)]
    >>> {env.n_objectives for env in tasks}, max(env.n_questions for env in tasks)
    ({2}, 61)
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
    if cfg.around and rng.random() < 0.1:  # a prompt of any length
        most = min(cfg.most_questions, envs.longest_horizon(cfg))
        after = int(rng.integers(most - before - n + 1))
    env = envs.make_env(cfg, before + n + after, [cfg.seed, stream, step, i, 0])

    # The turn budget: what the whole task gets; in some demonstrations less, to show what to do
    # when the turns run out; often much more, so that the agent has seen every number of turns left
    # that it may be told on a long horizon.
    questions = envs.read_questions(env.prompt)
    needed = [len(relations) * env.turns_per_hop for _, _, relations, _ in questions]
    done = sum(needed[:before])
    which = rng.random()
    if after:
        env.max_turns = done + sum(needed[before : before + n]) + 1
    elif which < 0.3 and stream == Stream.DEMOS:
        env.max_turns = done + int(rng.integers(2, max(3, env.max_turns - done)))
    elif which < 0.6:
        largest = max(env.max_turns, cfg.hops[1] * cfg.most_questions + 2)
        env.max_turns = int(rng.integers(env.max_turns, largest + 1))

    if before or after:
        play_history(env, POLICIES[agent], before, rng if has_random_notes(cfg, agent) else None)
        env.take_piece(before, n)
    return env


def has_random_notes(cfg, agent):
    """Does this agent imitate random notes? Those that mem1 is compared with get better ones."""
    return cfg.demos == "random" and agent == "mem1"


def demonstration(cfg, agent, step, i):
    """One episode of the demonstrator.

    >>> for agent in "mem1", "full":
    ...     sum(demonstration(Config(), agent, 0, i).env.em for i in range(20))
    22
    29
    """
    env = training_task(cfg, agent, Stream.DEMOS, step, i)
    rng = keyed_rng(cfg.seed, Stream.DEMOS, step, i, 2)
    return expert_rollout(env, POLICIES[agent], rng if has_random_notes(cfg, agent) else None)


# ----------------------------------------------------------------------------------------------
# The run: its directory, its checkpoint, its log


@dataclass
class Run:
    """A run in this process."""
    cfg: Config
    out: Path
    state: dict  # what a checkpoint holds
    started: float  # perf_counter() when it began, moved forward by any interruption
    signals: list = field(default_factory=list)  # those that asked it to stop

    def stop_later(self, number, frame):
        """On a signal: finish the step and save. On a second one: end at once."""
        if self.signals:
            os._exit(128 + number)
        self.signals.append(number)


EMPTY_STATE = dict(stage="", step=0, models={}, model=None, optimizer=None, seconds=0.0,
                   log_bytes=0)  # of metrics.jsonl


def plan(cfg):
    """The stages of a run: [(kind, agent), ...]."""
    if cfg.start:
        return [("ppo", agent) for agent in cfg.agents]
    stages = [("primer", None)]
    for agent in cfg.agents:
        stages += [("demos", agent), ("ppo", agent)]
    return stages


def log(run, kind, agent, step, row):
    """Write a step to metrics.jsonl; print it, unless it is one of many alike."""
    minutes = (time.perf_counter() - run.started) / 60
    row = dict(stage=kind, agent=agent, step=step, minutes=minutes, **row)
    if ppo.process()[0] == 0:
        with open(run.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    steps = getattr(run.cfg, f"{kind}_steps")
    if kind == "ppo" or step % 50 == 0 or step == steps:
        print0(log_line(row, steps, minutes_left(run.cfg, kind, agent, step, minutes)))


def minutes_left(cfg, kind, agent, step, minutes):
    """Minutes until all stages are done, if steps cost as they usually do on a CPU: half as much in
    the primer as in imitation, 10 times as much in PPO. The final table is not counted."""
    cost = dict(primer=0.5, demos=1.0, ppo=10.0)
    work = [cost[stage] * getattr(cfg, f"{stage}_steps") for stage, _ in plan(cfg)]
    done = sum(work[: plan(cfg).index((kind, agent))]) + cost[kind] * step
    return minutes * (sum(work) - done) / done


def log_line(row, steps, eta):
    """A step as one line to read, what matters most first."""
    parts = [f"{row['stage']} {row['agent'] or '':4s} {row['step']:04d}/{steps:04d}"]
    if row["stage"] == "ppo":
        parts += [
            f"reward {row['reward']:.2f}", f"em {row['em']:.2f}/{row['of']:.0f}",
            f"memory {row['memory']:.0%}",
            f"peak {row['peak']:.0f} vs full {row['unpruned']:.0f} "
            f"({row['unpruned'] / row['peak']:.1f}x)",
            f"turns {row['turns']:.1f}", f"kl {row['kl']:.3f}", f"ref {row['ref']:.3f}",
            f"clip {row['clip']:.0%}", f"ent {row['ent']:.2f}", f"ev {row['ev']:.2f}",
            f"gap {row['gap']:.0e}"]
    else:
        parts.append(f"loss {row['loss']:.4f}")
    parts += [f"{key} {row[key]:.2f}" for key in row if key.startswith("em@")]
    parts += [f"{row['tok_s'] / 1e3:.1f}k tok/s", f"eta {eta:.0f}m"]
    return " | ".join(parts)


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
    """Write bytes, or anything else as JSON, to a temporary file, flush it, then rename it."""
    if isinstance(content, dict):
        content = json.dumps(content, indent=1).encode()
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}")


def print0(line):
    """Print, by the first process alone, above the progress bar."""
    if ppo.process()[0] == 0:
        tqdm.write(line)


def resume_hint(cfg):
    """The end of a message about a run that stopped."""
    return f"to continue: python train.py --out {shlex.quote(cfg.out)} --resume"


def provenance():
    """What the numbers depend on besides the seed: the commit, with `+` where files differ from it
    (empty if this folder is no git repository of its own), and the machine."""
    here, commit = Path(__file__).resolve().parent, ""
    if (here / ".git").exists():
        command = "git describe --always --abbrev=40 --exclude=* --dirty=+".split()
        with contextlib.suppress(OSError):  # there is no git
            done = subprocess.run(command, cwd=here, capture_output=True, text=True)
            commit = done.stdout.strip()
    return dict(commit=commit, machine=f"{platform.machine()}, {os.cpu_count()} cores",
                python=platform.python_version(), torch=torch.__version__)


@contextlib.contextmanager
def locked(out):
    """The directory of a run, where meanwhile no other run can write."""
    Path(out).mkdir(parents=True, exist_ok=True)
    with open(Path(out) / "lock", "w") as file:
        if ppo.process()[0] == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f"{out}: another process is writing this run")
        yield Path(out)


def prepare(cfg, out):
    """The Run: its directory, and its state, new or from its checkpoint."""
    state = dict(EMPTY_STATE, models={})
    if cfg.resume:
        state = load_checkpoint(out)
        check_models(cfg, state["models"], f"{out}/config.json")
    elif cfg.start:
        models = load_run(cfg.start)[1]
        for name in [f"{agent}-demos" for agent in cfg.agents]:
            if name not in models:
                stop(f"--start {cfg.start}: it has no {name}")
            state["models"][name] = models[name]
        check_models(cfg, state["models"], f"--start {cfg.start}")
    run = Run(cfg, out, state, time.perf_counter() - state["seconds"])
    if ppo.process()[0] == 0:
        config = dict(config=dataclasses.asdict(cfg), **provenance())
        write_atomically(out / "config.json", config)
        with open(out / "metrics.jsonl", "a") as file:
            # Steps after the checkpoint will be redone.
            file.truncate(min(file.tell(), state["log_bytes"]))
    if not cfg.resume:
        save(run)
    on_signal(run.stop_later)
    return run


def check_models(cfg, models, where):
    """Stop if stored models differ from what is to be trained."""
    for name, saved in models.items():
        if GPTConfig(**saved["config"]) != gpt_config(cfg):
            stop(f"{where}: the model {name} differs in size, dtype or vocabulary")


def train(cfg, out):
    """All stages from where the run stands, then the final table."""
    ENC.add(envs.extra_words(cfg))
    run = prepare(cfg, out)
    done = run.state["models"]
    for kind, agent in plan(cfg):
        if model_names(kind, agent)[0] not in done:
            train_stage(run, kind, agent)

    on_signal(lambda number, frame: sys.exit(128 + number))  # all is saved
    if run.signals:
        sys.exit(128 + run.signals[-1])
    if ppo.process()[0] == 0 and {"mem1", "mem1-demos"} <= set(done):
        show_change(done, cfg)
    results = table(done, cfg, methods(done), cfg.eval_episodes, print0)
    minutes = (time.perf_counter() - run.started) / 60
    meta = dict(seed=cfg.seed, episodes=cfg.eval_episodes, minutes=minutes, **provenance())
    if ppo.process()[0] == 0:
        write_atomically(out / "results.json", {**results, "meta": meta})
    print0(trend(results))
    print0(f"{minutes:.0f} min; results in {cfg.out}/results.json; see what the agent does: "
           f"python eval.py {shlex.quote(cfg.out)} --show 2")


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
        parser.add_argument(flag(f.name), **options)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    try:
        return configure(given)
    except (ValueError, OSError) as error:
        refuse(str(error))


def flag(name):
    """n_embd -> --n-embd"""
    return "--" + name.replace("_", "-")


def configure(given):
    """A Config from the given fields. ValueError or OSError if they are invalid."""
    preset = given.get("preset", "cpu")
    cfg = Config(**{**PRESETS[preset], **given, "preset": preset})
    require(cfg.out, "--out: expected a directory")
    if cfg.resume:
        for name in given:
            require(name in MAY_CHANGE, f"{flag(name)}: a run goes on as it began; drop the flag")
        load_checkpoint(cfg.out)
        cfg = dataclasses.replace(read_config(cfg.out), **given)
    else:
        require(not (Path(cfg.out) / "checkpoint.pt").exists(),
                f"--out {cfg.out} holds a run already: add --resume, or choose another")
        if cfg.start:
            load_run(cfg.start)

    gpus = torch.cuda.device_count()
    if cfg.device == "auto":
        cfg.device = "cuda" if gpus else "cpu"
    require(gpus or cfg.device == "cpu", "--device cuda: torch finds no GPU here; try --device cpu")
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if cfg.device == "cuda" else "float32"
    available = gpus if cfg.device == "cuda" else os.cpu_count()
    if "RANK" in os.environ:  # started by torchrun, or by launch()
        require("WORLD_SIZE" in os.environ, "RANK is set, but not WORLD_SIZE: start it by torchrun")
        cfg.nproc = int(os.environ["WORLD_SIZE"])
    else:
        cfg.nproc = cfg.nproc or (available if cfg.device == "cuda" else min(4, available))
        require(cfg.nproc <= available, f"--nproc {cfg.nproc}: expected 1 to {available}")
    check(cfg)
    return cfg


def read_config(out):
    """The Config of a run, as last started or resumed. ValueError in one line."""
    try:
        cfg = Config(**vars(load_config(out)))
        check(cfg)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{Path(out) / 'config.json'} is not the configuration of a run: {error}")
    return cfg


def require(condition, message):
    """Refuse what a user gave, in one line."""
    if not condition:
        raise ValueError(message)


def check(cfg):
    """Checks that a flag's type cannot express. ValueError in one line."""
    for f in dataclasses.fields(Config):
        value, kind = getattr(cfg, f.name), f.type
        values = [value]
        if kind is tuple:
            require(isinstance(value, (tuple, list)) and value, f"{flag(f.name)}: expected values")
            values, kind = value, type(f.default[0])
        lowest = 1 if kind is int and f.name not in MAY_BE_ZERO else 0
        highest = HIGHEST.get(f.name, 1e9)
        for one in values:
            where = f"{flag(f.name)} {one}: expected"
            require(type(one) is kind, f"{where} {kind.__name__}")
            require(one in CHOICES.get(f.name, [one]), f"{where} one of {CHOICES.get(f.name)}")
            if kind in (int, float):
                require(lowest <= one <= highest, f"{where} {lowest:g} to {highest:g}")
        if f.name.endswith(("_batch", "_episodes")):
            require(value >= cfg.nproc, f"{flag(f.name)} {value}: expected one per process or more")
    for name in "objectives", "hops":
        value = getattr(cfg, name)
        fits = len(value) == 2 and value[0] <= value[1]
        require(fits, f"--{name} {value}: expected e.g. 1 2")
    require(cfg.hops[1] <= len(envs.COLONS), f"--hops {cfg.hops}: there are 5 relations at most")
    require(cfg.n_embd % cfg.n_head == 0 and cfg.n_embd >= 4 * cfg.n_head,
            f"--n-embd {cfg.n_embd} --n-head {cfg.n_head}: expected 4 or more channels per head")
    require(cfg.primer_longest > 1, "--primer-longest: expected 2 or more")
    require(cfg.ppo_minibatches <= cfg.ppo_batch, "--ppo-minibatches: expected at most --ppo-batch")
    longest = envs.longest_horizon(cfg)
    needs = {} if cfg.env == "qa" else envs.world_module(cfg.env).NEEDS
    flags = " ".join(f"{flag(name)} {value}" for name, value in needs.items())
    require(needs.items() <= vars(cfg).items(), f"--env {cfg.env}: add {flags}")
    for n in [*cfg.objectives, *cfg.eval_objectives]:
        require(n <= longest, f"--objectives, --eval-objectives {n}: expected 1 to {longest}")
    room = min(longest, cfg.most_questions) - cfg.objectives[1]
    require(2 * cfg.around <= max(0, room),
            f"--around {cfg.around}: expected 0 to {room // 2}; see --most-questions")


def launch(cfg, argv):
    """Run this script in cfg.nproc processes by torch's own launcher."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds to finish and save
    logging.disable()  # the messages below are enough
    try:
        torch.distributed.run.main(
            ["--standalone", f"--nproc-per-node={cfg.nproc}", "--", __file__, *argv])
    except SignalException as error:
        on_signal(signal.SIG_IGN)  # all is saved: a second one would only interrupt the clean-up
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code > 0:
            sys.exit(code)  # it has said why
        sys.exit(f"train.py: a process died of signal {-code}; {resume_hint(cfg)}")


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
        with locked(cfg.out) as out:
            train(cfg, out)
    except FloatingPointError as error:
        stop(f"{error}; start again with a lower learning rate")
    except OSError as error:
        stop(f"{error}; nothing written before is lost; {resume_hint(cfg)}")
    except RuntimeError as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        lost = re.search("gloo|nccl|connection|timed out", str(error), re.I)
        if not dist.is_initialized() or not lost or f"{os.sep}torch{os.sep}" not in where:
            raise
        os._exit(1)  # another process died, and the launcher says so
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
