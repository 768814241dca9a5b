"""eval.py: how well the agents of a run do, and at which cost in memory, over horizons never trained.

    python eval.py runs/cpu                # the trend: 1, 2, 4, 8, 16, 32 objectives
    python eval.py runs/cpu --show 2       # two trajectories, turn by turn: what is kept, new and pruned
    python eval.py runs/cpu --json         # the same table as JSON
    python eval.py runs/cpu --layouts      # what the learner sees in three layouts against what acted
    python eval.py --layouts               # the same with random weights, on demonstrations
    python eval.py --compare runs/*-[123]  # PPO of several runs side by side, those of a layout together

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
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import envs
from mem1 import ENC, LAYOUTS, POLICIES, TAG_IDS, Turn, demonstrate, evaluate, expert, mem1, pack, parse, recorded, rollout
from model import GPT, GPTConfig

VALID, TEST = 3, 4  # second part of an episode's seed; training has 0 to 2 (train.py)
BATCH = 64  # episodes side by side: bounds the memory of the agent that keeps everything


MEASURES = ("em", "f1", "peak", "dependency", "turns", "valid", "right", "time", "kv_bytes", "tokens", "state", "query", "info", "answer")


def play(model, policy, world, n_objectives, episodes, split, rank=0, world_size=1):
    """Greedy episodes, their trajectories one by one. The processes share the work."""
    mine = range(rank, episodes, world_size)
    for i in range(0, len(mine), BATCH):
        yield from rollout(model, [envs.ComposedQA(n_objectives, tuple(world.hops), world.distractors, world.top_k, [0, split, n_objectives, j, 0])
                                   for j in mine[i : i + BATCH]], policy)


def measure(model, policy, world, n_objectives, episodes, split, rank=0, world_size=1):
    """Means over test episodes, {name: value} for the MEASURES."""
    rows = [measures(traj, policy) for traj in play(model, policy, world, n_objectives, episodes, split, rank, world_size)]
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, rows)
        rows = sum(parts, [])
    return dict(zip(MEASURES, torch.tensor(rows, dtype=torch.float64).mean(0).tolist()))


def measures(traj, policy):
    """One episode's, in the order of MEASURES."""
    n, turns = len(traj.turns), traj.turns
    right = sum(turn.written == expert(traj.env.prompt, policy, turns[:t]) for t, turn in enumerate(turns))
    tokens = len(traj.task) + sum(len(branch.ids) for branch in traj.branches)
    answer = len(turns[-1].action) if traj.env.cause == "answered" else 0
    longest = [max(len(turn.state) for turn in turns), max((len(turn.action) for turn in turns if turn.info), default=0), max(len(turn.info) for turn in turns)]
    return [traj.env.em, traj.env.f1, traj.peak, traj.dependency, n, traj.valid / n, right / n, traj.seconds, traj.kv_bytes, tokens, *longest, answer]


def methods(models):
    """{method: (model, policy)} of a run: what it trained, and `truncate`, MEM1's context with full context's weights."""
    found = {name: (name, policy) for agent, policy in POLICIES.items() for name in (agent, f"{agent}-demos") if name in models}
    return {**found, "truncate": ("full", mem1)} if "full" in models else found


def table(models, world, methods, say, episodes, rank=0, world_size=1, device="cpu"):
    """{method: {objectives: measures}}, a line said for each as it is known."""
    say(f"{'method':13s} {'N':>3s} {'em':>6s} {'of N':>5s} {'f1':>6s} {'peak':>7s} {'turns':>6s} {'valid':>6s} {'right':>6s} {'dependency':>10s} {'KB':>6s} {'time':>7s}")
    results = {}
    for name, (model, policy) in methods.items():
        model = load(models[model], device)
        for n in world.eval_objectives:
            r = measure(model, policy, world, n, episodes, TEST, rank, world_size)
            results.setdefault(name, {})[str(n)] = r
            say(f"{name:13s} {n:3d} {r['em']:6.2f} {r['em'] / n:5.0%} {r['f1']:6.2f} {r['peak']:7.1f} {r['turns']:6.1f} {r['valid']:6.1%} "
                f"{r['right']:6.1%} {r['dependency']:10.0f} {r['kv_bytes'] / 1e3:6.0f} {r['time']:6.3f}s")
    return results


def load(saved, device="cpu"):
    """A model as saved: [config, weights]."""
    model = GPT(GPTConfig(**saved[0])).to(device)
    model.load_state_dict(saved[1])
    return model


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


def slip(traj, policy):
    """Where an episode first left the way: (cause, turn, written, right), of the first turn that is not what the
    demonstrator would have written, given what the agent saw; None if there is no such turn."""
    for t, turn in enumerate(traj.turns):
        right = expert(traj.env.prompt, policy, traj.turns[:t])
        if turn.written == right:
            continue
        (kind, state, _, text), (want, right_state, _, right_text) = parse(turn.written), parse(right)
        state, right_state = ENC.decode(state), ENC.decode(right_state)
        has, should = (dict(re.findall(r"(#\d+) (\w+)", words)) for words in (f"{state} | {text}", f"{right_state} | {right_text}"))
        asks, should_ask = (re.findall(r"(#\d+) :+", words) for words in (state, right_state))
        if kind == "malformed":
            cause = "malformed, or cut off"
        elif kind != want:
            cause = "stopped early" if kind == "answer" else "did not stop"
        elif asks != should_ask and not set(should_ask) & set(has) and not set(asks) & set(should):
            cause = "took up another question"
        elif asks != should_ask or any(index in has for index in asks):
            cause = "wrong hop"
        elif should.keys() - has.keys():
            cause = "lost an entry"
        elif has.keys() - should.keys():
            cause = "made up an entry"
        elif has != should:
            cause = "changed an entry"
        elif text != right_text or re.findall(":+ .*(?= )", state) != re.findall(":+ .*(?= )", right_state):
            cause = "wrong hop"
        else:
            cause = "wrong next question" if state.split()[-1:] != right_state.split()[-1:] else "another wording"
        return cause, t + 1, ENC.decode(turn.written), ENC.decode(right)


def failures(models, world, methods, n, episodes, say, device="cpu"):
    """Episodes that lost objectives, sorted by the cause of their first slip: {method: {cause: measures}}, each with an example."""
    results = {}
    for name, (model, policy) in methods.items():
        causes = results.setdefault(name, {})
        for traj in play(load(models[model], device), policy, world, n, episodes, TEST):
            if traj.env.em < n:
                cause, turn, wrote, right = slip(traj, policy) or ("not in context any more", len(traj.turns), "", "")
                row = causes.setdefault(cause, dict(episodes=0, lost=0, turn=0, example=f"turn {turn}: {wrote}\n      right was: {right}"))
                row["episodes"], row["lost"], row["turn"] = row["episodes"] + 1, row["lost"] + n - traj.env.em, row["turn"] + turn
        say(f"{name}, {n} objectives: {sum(row['episodes'] for row in causes.values())} of {episodes} episodes lost objectives; their first slip:")
        results[name] = dict(sorted(causes.items(), key=lambda item: -item[1]["lost"]))
        for cause, row in results[name].items():
            row["turn"] /= row["episodes"]
            say(f"  {cause}: {row['episodes']} episodes, {row['lost']} objectives lost, at turn {row['turn']:.0f} on average; for example\n    {row['example']}")
    return results


def memory(models, world, methods, n, episodes, say, device="cpu"):
    """What the state holds, by turn: {method: {turn: {going, found, held, right, state}}}.

        going  share of the episodes that come so far          held   share of them that stand in the state, rightly
        found  answers that the agent has been shown so far    right  share of turns that are what the demonstrator would write
        state  tokens in the state
    """
    results = {}
    for name, (model, policy) in methods.items():
        by_turn = {}
        for traj in play(load(models[model], device), policy, world, n, episodes, TEST):
            shown, last = "", final_facts(traj.env)
            for t, turn in enumerate(traj.turns):
                text, (kind, *_) = ENC.decode(turn.state), parse(turn.written)
                found = [f"{index} {fact.split()[-1]} " for index, fact in last.items() if fact in shown]
                right = turn.written == expert(traj.env.prompt, policy, traj.turns[:t])
                if kind == "query":
                    by_turn.setdefault(t + 1, []).append((len(found), sum(entry in text for entry in found), right, len(turn.state)))
                shown += ENC.decode(turn.info) + ","
        rows = results.setdefault(name, {})
        for t, cells in sorted(by_turn.items()):
            found, held, right, state = np.mean(cells, axis=0).tolist()
            rows[str(t)] = dict(going=len(cells) / episodes, found=found, held=held / found if found else 0.0, right=right, state=state)
        say(f"{name}, {n} objectives\n{'turn':>5s} {'going':>6s} {'found':>6s} {'held':>6s} {'right':>6s} {'state':>6s}")
        for t, r in rows.items():
            say(f"{t:>5s} {r['going']:6.0%} {r['found']:6.1f} {r['held']:6.0%} {r['right']:6.1%} {r['state']:6.1f}")
    return results


def final_facts(env):
    """{index: the fact that answers its question}, by following each chain of relations through the facts."""
    known, last = {tuple(fact.split()[:2]): fact.split()[2] for fact in env.facts}, {}
    for question in env.questions:
        index, _, subject, *relations = question.split()
        for relation in relations:
            last[index], subject = f"{subject} {relation} {known[subject, relation]},", known[subject, relation]
        last[index] = last[index][:-1]
    return last


def layouts(model, world, horizons, episodes, say):
    """What a layout would train against what acted, on the same MEM1 trajectories, sampled from `model`:

        mean_nats, max_nats  difference of log-probability a trained token
        leak                 the same in the last turn, when all words of turns that it did not see are exchanged
        tokens, seconds      encoded, and taken for forward and backward pass, a trajectory

    Returns {layout: {objectives: measures}}. world None: random weights, which play no episode to its end;
    the demonstrator does, and "what acted" is then the tree.
    """
    say(f"{'layout':9s} {'N':>3s} {'mean nats':>10s} {'max nats':>9s} {'leak':>9s} {'tokens':>7s} {'time':>7s}   mean nats at turn 1, 2, 3, 4, 8, 16")
    results = {}
    for n in horizons:
        seeds = [[0, TEST, n, i] for i in range(episodes)]
        if world:
            worlds = [envs.ComposedQA(n, tuple(world.hops), world.distractors, world.top_k, [*seed, 0]) for seed in seeds]
            trajs = rollout(model, worlds, mem1, [np.random.default_rng([*seed, 2]) for seed in seeds])
            acted = torch.tensor(recorded(trajs, "logp"))  # (M,)
        else:
            trajs = [demonstrate(envs.ComposedQA(n, seed=[*seed, 0]), mem1) for seed in seeds]
            acted = learned(model, trajs)[0]
        turn = torch.tensor([t for traj in trajs for t, this in enumerate(traj.turns) for _ in this.written])  # (M,)
        last = torch.cat([torch.arange(traj.n_trained) >= traj.n_trained - len(traj.turns[-1].written)
                          for traj in trajs])  # (M,) in the last turn of its episode
        for name, layout in LAYOUTS.items():
            views = list(map(layout, trajs))
            logp, seconds = learned(model, views)
            off = (logp - acted).abs()  # (M,)
            leak = (learned(model, [layout(exchange_pruned(traj)) for traj in trajs])[0] - logp).abs()[last]
            r = dict(mean_nats=off.mean().item(), max_nats=off.max().item(), leak=leak.mean().item(), seconds=seconds / len(trajs),
                     tokens=sum(len(v.task) + sum(len(b.ids) for b in v.branches) for v in views) / len(views))
            results.setdefault(name, {})[str(n)] = r
            by_turn = " ".join(f"{off[turn == t - 1].mean():.0e}" for t in (1, 2, 3, 4, 8, 16) if (turn == t - 1).any())
            say(f"{name:9s} {n:3d} {r['mean_nats']:10.1e} {r['max_nats']:9.1e} {r['leak']:9.1e} {r['tokens']:7.0f} {r['seconds']:6.3f}s   {by_turn}")
    return results


def learned(model, trajs):
    """The learner's log-probabilities (M,) of all trained tokens, and the seconds that forward and backward pass took."""
    logp, began = torch.empty(sum(traj.n_trained for traj in trajs)), time.perf_counter()
    for batch in pack(trajs):
        mine = evaluate(model, batch.to(model.emb.weight.device))[0]  # (M',)
        mine.sum().backward()
        logp[batch.index] = mine.detach().cpu()
    model.zero_grad()
    return logp, time.perf_counter() - began


def exchange_pruned(traj):
    """The same trajectory with other words in what the last turn does not see: all turns but the last two."""
    other = lambda ids: [token if token in TAG_IDS else 256 + (token - 255) % (TAG_IDS[0] - 256) for token in ids]
    turns = [Turn(other(t.state), other(t.action), other(t.info)) for t in traj.turns[:-2]] + traj.turns[-2:]
    branches = [replace(b, ids=other(b.ids)) for b in traj.branches[:-1]] + traj.branches[-1:]
    return replace(traj, turns=turns, branches=branches)


def compare(paths, say):
    """PPO of finished runs with the mem1 agent, grouped by layout: mean (lowest to highest). {layout: {name: [a run, ...]}}."""
    groups = {}
    for path in map(Path, paths):
        world, _ = load_run(path)
        if not (path / "results.json").is_file():
            sys.exit(f"eval.py: {path} is not finished; go on with it: python train.py --out {path} --resume")
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if (row["stage"], row["agent"]) == ("ppo", "mem1")]
        group = groups.setdefault(world.layout, {})
        for i in range(4):  # the reward over each quarter of the iterations
            quarter = rows[len(rows) * i // 4 : len(rows) * (i + 1) // 4]
            group.setdefault(f"reward {i + 1}/4", []).append(float(np.mean([row["reward"] for row in quarter])))
        for name, pick in ("kl", np.mean), ("clip", np.mean), ("gap", np.max):
            group.setdefault(name, []).append(float(pick([row[name] for row in rows])))
        for n, cell in json.loads((path / "results.json").read_text())["mem1"].items():
            group.setdefault(f"em@{n}", []).append(cell["em"])
    say(" " * 10 + "".join(f" | {layout + ', ' + str(len(group['kl'])) + ' runs':26s}" for layout, group in groups.items()))
    for name in next(iter(groups.values())):
        columns = [group.get(name, [float("nan")]) for group in groups.values()]
        say(f"{name:10s}" + "".join(f" | {np.mean(x):7.2g} ({min(x):7.2g} to {max(x):7.2g})" for x in columns))
    return groups


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


def numbers(text):
    """"2,16" -> [2, 16], for argparse."""
    values = [int(n) for n in text.split(",")]
    if not all(1 <= n <= len(envs.INDICES) for n in values):
        raise ValueError
    return values


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"eval.py: {message} (python eval.py --help lists the flags)\n")
    parser.add_argument("run", nargs="?", help="directory of a run, e.g. runs/cpu")
    parser.add_argument("--policies", help="comma-separated, e.g. mem1,full-demos; default: all that the run has")
    parser.add_argument("--objectives", type=numbers, help="comma-separated horizons, e.g. 2,16; default: the run's")
    parser.add_argument("--episodes", type=int, help="episodes a cell; default: the run's")
    parser.add_argument("--show", type=int, metavar="K", help="print K trajectories instead of the table")
    parser.add_argument("--failures", action="store_true", help="why objectives were lost, by cause, instead of the table")
    parser.add_argument("--memory", action="store_true", help="what the state holds, by turn, instead of the table")
    parser.add_argument("--layouts", action="store_true", help="compare what layouts would train with what acted, instead of the table")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="PPO of several runs, those of a layout together")
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    say = (lambda line: None) if args.json else tqdm.write
    if args.compare:
        results = compare(args.compare, say)
        return print(json.dumps(results)) if args.json else None
    if not args.run and not args.layouts:
        parser.error("no run given; expected the directory of a run of train.py, such as runs/cpu")
    torch.manual_seed(0)
    world, models = load_run(args.run) if args.run else (None, {"mem1": None})
    have = methods(models)
    chosen = {name: have[name] for name in args.policies.split(",") if name in have} if args.policies else have
    if args.policies and len(chosen) < len(args.policies.split(",")):
        parser.error(f"--policies {args.policies}: the run has {', '.join(have) or 'none yet'}")

    if args.layouts:
        model = load(models["mem1"], args.device) if args.run else GPT(GPTConfig(ENC.n_vocab)).to(args.device)
        results = layouts(model, world, args.objectives or [2, 4, 8, 16], args.episodes or 64, say)
    elif args.failures or args.memory:
        n = args.objectives[0] if args.objectives else 16
        results = (failures if args.failures else memory)(models, world, chosen, n, args.episodes or 64, say, args.device)
    elif args.show:
        for name, (model, policy) in chosen.items():
            n = args.objectives[0] if args.objectives else 4
            print(f"--- {name}, {n} objectives: - pruned, = kept, + written now")
            for traj in play(load(models[model], args.device), policy, world, n, args.show, TEST):
                show(traj, policy, sys.stdout.isatty())
        return
    else:
        world.eval_objectives = args.objectives or world.eval_objectives
        results = table(models, world, chosen, say, args.episodes or world.eval_episodes, device=args.device)
        if "mem1" in results:
            say(trend(results))
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
