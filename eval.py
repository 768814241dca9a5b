"""eval.py: how well the agents of a run do, and at which cost in memory, over horizons never trained.

    python eval.py runs/cpu                # the trend: 1, 2, 4, 8, 16, 32 objectives
    python eval.py runs/cpu --show 2       # two trajectories, turn by turn: what is kept, new and pruned
    python eval.py runs/cpu --json         # the same table as JSON

Greedy decoding. Episodes come from seeds that no training and no validation episode uses (`TEST`).

    em, f1  objectives answered exactly, and their token F1, summed over the task's objectives (0..N)
    peak    most tokens in context over the turns, task not counted, as in the paper; averaged over all
            episodes (the paper's release averages over those with some success)
    turns   exchanges with the environment
    valid   share of turns that are well-formed
    time    seconds an episode, many played side by side in a process
"""
import argparse
import difflib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

import envs
from mem1 import ENC, POLICIES, rollout
from model import GPT, GPTConfig

VALID, TEST = 3, 4  # second part of an episode's seed; training has 0 to 2 (train.py)
BATCH = 64  # episodes side by side: bounds the memory of the agent that keeps everything


def measure(model, agent, world, n_objectives, episodes, split, rank=0, world_size=1):
    """Means over `episodes` test episodes: {em, f1, peak, turns, valid, time}. The processes share the work."""
    mine, rows = range(rank, episodes, world_size), []
    for i in range(0, len(mine), BATCH):
        environments = [envs.ComposedQA(n_objectives, tuple(world.hops), world.distractors, world.top_k, [0, split, n_objectives, j, 0])
                        for j in mine[i : i + BATCH]]
        for traj in rollout(model, environments, POLICIES[agent]):
            rows.append([traj.env.em, traj.env.f1, traj.peak, len(traj.turns), traj.valid / len(traj.turns), traj.seconds])
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, rows)
        rows = sum(parts, [])
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    return dict(zip(("em", "f1", "peak", "turns", "valid", "time"), means))


def table(models, world, policies, say, episodes, rank=0, world_size=1, device="cpu"):
    """{policy: {objectives: measures}}, a line said for each as it is known."""
    say(f"{'policy':12s} {'N':>3s} {'em':>6s} {'of N':>5s} {'f1':>6s} {'peak':>7s} {'turns':>6s} {'valid':>6s} {'time':>7s}")
    results = {}
    for name in policies:
        config, weights = models[name]
        model = GPT(GPTConfig(**config)).to(device)
        model.load_state_dict(weights)
        for n in world.eval_objectives:
            r = measure(model, name.split("-")[0], world, n, episodes, TEST, rank, world_size)
            results.setdefault(name, {})[str(n)] = r
            say(f"{name:12s} {n:3d} {r['em']:6.2f} {r['em'] / n:5.0%} {r['f1']:6.2f} {r['peak']:7.1f} {r['turns']:6.1f} "
                f"{r['valid']:6.1%} {r['time']:6.3f}s")
    return results


def trend(results):
    """The paper's headline, at the farthest horizon up to 16: accuracy gained and memory saved over full context."""
    n = max((n for n in results.get("full", {}) if int(n) <= 16), key=int, default=None)
    if n is None:
        return "no full-context agent in this run: nothing to compare with"
    a, b = results["mem1"][n], results["full"][n]
    times = "inf" if b["em"] == 0 else f"{a['em'] / b['em']:.1f}"
    return (f"at {n} objectives mem1 answers {a['em']:.2f}, full context {b['em']:.2f}: {times} times the accuracy, "
            f"with 1/{b['peak'] / a['peak']:.1f} of the peak tokens (paper: 3.5 times, 1/3.7)")


def show(traj, policy, color):
    """One trajectory, turn by turn: `-` pruned since the last turn, `=` kept, `+` written now, `?` the answer to it."""
    paint = (lambda code, text: f"\033[{code}m{text}\033[0m") if color else (lambda code, text: text)
    print(paint("1", f"task   {ENC.decode(traj.task)}"))
    before = []
    for t, turn in enumerate(traj.turns):
        kept = policy(traj.turns[:t]) if t else []
        changes = difflib.SequenceMatcher(None, before, kept, autojunk=False).get_opcodes()
        pruned = [token for op, a, b, _, _ in changes if op != "equal" for token in before[a:b]]
        print(f"turn {t + 1}")
        for mark, code, ids in ("-", "2;9", pruned), ("=", "36", kept), ("+", "1;32", turn.state + turn.action):
            if ids:
                print(paint(code, f"     {mark} {ENC.decode(ids)}"))
        before = kept + turn.state + turn.action + turn.info
    golds = " ".join(f"{index} {gold}" for index, gold in traj.env.golds)
    print(f"       {traj.env.cause}; right would be {golds}: em {traj.env.em}/{traj.env.n_objectives}, peak {traj.peak} tokens\n")


def provenance():
    """What the numbers depend on besides the seed: code and machine."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return dict(commit=git.stdout.strip() or "unknown", machine=f"{platform.machine()}, {os.cpu_count()} cores",
                python=platform.python_version(), torch=torch.__version__)


def write_atomically(path, write):
    """Call write(temporary path), then rename: a reader finds the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def load_run(path):
    """(world, models) of a run's directory; exits with one line if there is no such run."""
    config, checkpoint = Path(path) / "config.json", Path(path) / "checkpoint.pt"
    for file in config, checkpoint:
        if not file.is_file():
            sys.exit(f"eval.py: {file} does not exist; expected the directory of a run of train.py, such as runs/cpu")
    world = SimpleNamespace(**json.loads(config.read_text())["config"])
    return world, torch.load(checkpoint, map_location="cpu", weights_only=True)["models"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="directory of a run, e.g. runs/cpu")
    parser.add_argument("--policies", help="comma-separated, e.g. mem1,full-demos; default: all that the run has")
    parser.add_argument("--objectives", help="comma-separated horizons, e.g. 2,16; default: the run's")
    parser.add_argument("--episodes", type=int, help="episodes a cell; default: the run's")
    parser.add_argument("--show", type=int, metavar="K", help="print K trajectories instead of the table")
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    world, models = load_run(args.run)
    have = [name for name in models if name != "primer"]
    policies = args.policies.split(",") if args.policies else have
    if not set(policies) <= set(have):
        parser.error(f"--policies {args.policies}: the run has {', '.join(have) or 'none yet'}")
    if args.objectives:
        world.eval_objectives = [int(n) for n in args.objectives.split(",")]
    if args.show:
        for name in policies:
            config, weights = models[name]
            model, policy = GPT(GPTConfig(**config)).to(args.device), POLICIES[name.split("-")[0]]
            model.load_state_dict(weights)
            n = 4 if not args.objectives else world.eval_objectives[0]
            worlds = [envs.ComposedQA(n, tuple(world.hops), world.distractors, world.top_k, [0, TEST, n, i, 0]) for i in range(args.show)]
            print(f"--- {name}, {n} objectives: - pruned, = kept, + written now")
            for traj in rollout(model, worlds, policy):
                show(traj, policy, sys.stdout.isatty())
        return
    say = (lambda line: None) if args.json else tqdm.write
    results = table(models, world, policies, say, args.episodes or world.eval_episodes, device=args.device)
    if args.json:
        print(json.dumps(results))
    elif "mem1" in results:
        print(trend(results))


if __name__ == "__main__":
    main()
