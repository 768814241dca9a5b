"""eval.py: how well the agents of a run do, and at which cost in memory, over horizons never trained.

    python eval.py runs/cpu                # the trend: 1, 2, 4, 8, 16, 32 objectives
    python eval.py runs/cpu --show 2       # two trajectories, turn by turn: what is kept, new and pruned
    python eval.py runs/cpu --json         # the same table as JSON
    python eval.py runs/cpu --failures     # why objectives were lost at 16, by the first slip of each episode
    python eval.py runs/cpu --memory       # what the state holds at 16, turn by turn
    python eval.py runs/cpu --layouts      # what the learner sees in three layouts against what acted
    python eval.py --layouts               # the same with random weights, on demonstrations
    python eval.py --compare runs/*-[123]  # PPO of several runs side by side, those of like settings together
    python eval.py --table runs/sweep/*-?  # every table of the README, from several seeds (train.py --sweep)

Greedy decoding. Episodes come from seeds that no training and no validation episode uses (`TEST`).

    em, f1      objectives answered exactly, and their token F1, summed over the task's objectives (0..N)
    peak        most tokens in context over the turns, task not counted, as in the paper; averaged over all
                episodes (the paper's release averages over those with some success)
    dependency  tokens that all written tokens looked back on, task not counted (the paper's app. A.4)
    turns       exchanges with the environment
    valid       share of turns that are well-formed
    right       share of turns that are, word for word, what the demonstrator would write, given what the agent saw
                (`truncate` was taught another wording: its share says little)
    time        seconds an episode, many played side by side in a process
    kv_bytes    key-value memory allocated for an episode, task included; depends on those beside it
    tokens      encoded in an episode, read and written, task included
    state, query, info, answer   longest of the episode, in tokens
"""
import argparse
import contextlib
import copy
import datetime
import difflib
import functools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import timeit
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import envs
import mem1 as core
from mem1 import END, ENC, LAYOUTS, POLICIES, TAG_IDS, TASK, Trajectory, Turn, demonstrate, evaluate, expert, mem1, pack, parse, recorded, rollout, sample
from model import GPT, Cache, GPTConfig, as_bias, attend, fits, restore, write_atomically

VALID, TEST = 3, 4  # second part of an episode's seed; training has 0 to 2 (train.py)
BATCH = 64  # episodes side by side: bounds the memory of the agent that keeps everything


def play(model, policy, world, n_objectives, episodes, split, rank=0, world_size=1):
    """Greedy episodes, their trajectories one by one. The processes share the work."""
    mine = range(rank, episodes, world_size)
    for i in range(0, len(mine), BATCH):
        yield from rollout(model, [envs.make(world, n_objectives, [0, split, n_objectives, j, 0]) for j in mine[i : i + BATCH]], policy)


def measure(model, policy, world, n_objectives, episodes, split, rank=0, world_size=1):
    """Means of measures() over test episodes."""
    rows = [measures(traj, policy) for traj in play(model, policy, world, n_objectives, episodes, split, rank, world_size)]
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, rows, patient())
        rows = sum(parts, [])
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@functools.cache
def patient():
    """A group of all processes that waits half an hour for the slowest: an agent that does not stop in time plays long."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=30))


def measures(traj, policy):
    """What the head of this file lists, of one episode."""
    n, turns, env = len(traj.turns), traj.turns, traj.env
    return dict(
        em=env.em, f1=env.f1, peak=traj.peak, dependency=traj.dependency, turns=n, valid=traj.valid / n,
        right=sum(turn.written == expert(env, policy, turns[:t]) for t, turn in enumerate(turns)) / n,
        time=traj.seconds, kv_bytes=traj.kv_bytes, tokens=len(traj.task) + sum(len(branch.ids) for branch in traj.branches),
        state=max(len(turn.state) for turn in turns), query=max((len(turn.action) for turn in turns if turn.info), default=0),
        info=max(len(turn.info) for turn in turns), answer=len(turns[-1].action) if env.cause == "answered" else 0)


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
    n = max((n for n in results.get("full", {}) if int(n) <= 16 and "mem1" in results), key=int, default=None)
    if n is None:
        return "this run has not both mem1 and full: nothing to compare"
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


def ask(model, policy, world, text):
    """Questions of the user's own, `name relation ...; name relation ...`, to an agent that was trained on a file of facts."""
    facts = envs.read_facts(world.facts, world.skip_bad_facts)[0]
    questions = [facts.parse(question) for question in text.split(";") if question.strip()]
    if not 1 <= len(questions) <= len(envs.INDICES):
        raise ValueError(f"{len(questions)} questions: expected 1 to {len(envs.INDICES)}, with a semicolon between two")
    hops = 1, max(len(relations) for _, relations in questions)
    (traj,) = rollout(model, [envs.ComposedQA(len(questions), hops, top_k=world.top_k, facts=facts, asked_for=questions)], policy)
    show(traj, policy, sys.stdout.isatty())
    answer = parse(traj.turns[-1].written)[3] if traj.env.cause == "answered" else ""
    given = dict(reversed(re.findall(rf"(#\d+)((?: {envs.WORD})+)", answer)))  # of an index that occurs twice the first counts
    for (index, gold), (subject, relations) in zip(traj.env.golds, questions):
        wrong = "" if envs.score(answer, [(index, gold)])[0] else f" (wrong: {gold})"
        print(f"{subject} {' '.join(relations)}:{given.get(index, ' no answer')}{wrong}")


def slip(traj, policy):
    """Where an episode first left the way: (cause, turn, written, right), of the first turn that is not what the
    demonstrator would have written, given what the agent saw; None if there is no such turn."""
    for t, turn in enumerate(traj.turns):
        right = expert(traj.env, policy, traj.turns[:t])
        if turn.written != right and (cause := difference(turn.written, right)):
            return cause, t + 1, ENC.decode(turn.written), ENC.decode(right)


def difference(written, right):
    """The cause of a slip, in a few words; None if only the wording differs."""
    def read(ids):
        kind, state, _, text = parse(ids)
        state = ENC.decode(state)
        opens = re.findall(envs.OPEN, state)
        index, subject, relations, then = opens[-1] if opens else ("",) * 4
        memory = text if kind == "answer" else state.partition(envs.LIST)[2]
        return SimpleNamespace(kind=kind, text=text, index=index, question=(subject, relations, state.count(":")), then=then,
                               entries=dict(re.findall(envs.ENTRY, memory)), words=sorted(envs.words(memory)))

    got, want = read(written), read(right)
    if got.kind == "malformed":
        return "malformed, or cut off"
    if got.kind != want.kind:
        return "stopped early" if got.kind == "answer" else "did not stop"
    if got.kind == "query" and not got.index and want.index:
        return "lost the question"
    if want.index in got.entries or got.index in want.entries:  # an open question written as an answer, or an answer as an open question
        return "wrong hop"
    if want.entries.keys() - got.entries.keys():
        return "lost an entry"
    if got.entries.keys() - want.entries.keys():
        return "made up an entry"
    if got.entries != want.entries:
        return "changed an entry"
    if got.index != want.index:
        return "took up another question"
    if got.question != want.question or got.kind == "query" and got.text != want.text:
        return "wrong hop"
    if got.then != want.then:
        return "wrong next question"
    if got.words != want.words:  # a tally, what a user said, the best product so far; or an entry twice
        return "wrong answer" if got.kind == "answer" else "remembers something else"


def failures(models, world, methods, n, episodes, say, device="cpu"):
    """Episodes that lost objectives, sorted by the cause of their first slip: {method: {cause: measures}}, each with an example."""
    results = {}
    for name, (model, policy) in methods.items():
        causes = results.setdefault(name, {})
        for traj in play(load(models[model], device), policy, world, n, episodes, TEST):
            if traj.env.em < traj.env.best:
                cause, turn, wrote, right = slip(traj, policy) or ("not in context any more", len(traj.turns), "", "")
                row = causes.setdefault(cause, dict(episodes=0, lost=0, turn=0, example=f"turn {turn}: {wrote}\n      right was: {right}"))
                row["episodes"], row["lost"], row["turn"] = row["episodes"] + 1, row["lost"] + traj.env.best - traj.env.em, row["turn"] + turn
        say(f"{name}, {n} objectives: {sum(row['episodes'] for row in causes.values())} of {episodes} episodes lost objectives; their first slip:")
        results[name] = dict(sorted(causes.items(), key=lambda item: -item[1]["lost"]))
        for cause, row in results[name].items():
            row["turn"] /= row["episodes"]
            say(f"  {cause}: {row['episodes']} episodes, {row['lost']:g} objectives lost, at turn {row['turn']:.0f} on average; for example\n    {row['example']}")
    return results


def memory(models, world, methods, n, episodes, say, device="cpu"):
    """What the state holds, by turn: {method: {turn: {going, found, held, right, state}}}.

        going  share of the episodes that come so far
        found  answers that the agent has asked for and been shown so far
        held   share of them that stand in its state (an agent that keeps older states need not repeat them)
        right  share of turns that are what the demonstrator would write
        state  tokens in the state
    """
    results = {}
    for name, (model, policy) in methods.items():
        by_turn = {}
        for traj in play(load(models[model], device), policy, world, n, episodes, TEST):
            found = set()
            for t, turn in enumerate(traj.turns):
                held, (kind, _, _, asked) = set(re.findall(envs.ENTRY, ENC.decode(turn.state))), parse(turn.written)
                right = turn.written == expert(traj.env, policy, traj.turns[:t])
                if kind == "query":
                    by_turn.setdefault(t + 1, []).append((len(found), len(found & held), right, len(turn.state)))
                asked = re.escape(asked.strip().removeprefix("page "))
                shown = re.findall(rf"{asked}(?: {envs.WORD}){{{max(0, 2 - asked.count(' '))}}}", ENC.decode(turn.info))
                found |= {(index, path[-1].split()[-1]) for index, path in traj.env.paths.items() if path[-1] in shown}
        rows = results.setdefault(name, {})
        for t, cells in sorted(by_turn.items()):
            found, held, right, state = np.mean(cells, axis=0).tolist()
            rows[str(t)] = dict(going=len(cells) / episodes, found=found, held=held / found if found else 0.0, right=right, state=state)
        say(f"{name}, {n} objectives\n{'turn':>5s} {'going':>6s} {'found':>6s} {'held':>6s} {'right':>6s} {'state':>6s}")
        for t, r in rows.items():
            say(f"{t:>5s} {r['going']:6.0%} {r['found']:6.1f} {r['held']:6.0%} {r['right']:6.1%} {r['state']:6.1f}")
    return results


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
            worlds = [envs.make(world, n, [*seed, 0]) for seed in seeds]
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
    """PPO of finished runs with the mem1 agent: mean (lowest to highest). Together are those that were trained alike but for the seed.

    Returns {the settings that set them apart: {name: [a run, ...]}}: the reward over each quarter of the iterations, the iterations
    until its mean over five of them is at least 0.8 (None: never), what became of the policy, and the final table.
    """
    elsewhere = "preset out resume seed device nproc threads timeout agents start sweep assets eval_objectives eval_episodes".split()  # not how mem1 is trained
    groups, settings = {}, []
    for path in paths:
        world, _ = load_run(path)
        world.facts = Path(world.facts).name  # each run has its own copy
        settings.append({name: " ".join(map(str, np.ravel(value))) or "-" for name, value in vars(world).items() if name not in elsewhere})
    apart = [name for name in settings[0] if len({run[name] for run in settings}) > 1]
    for path, run in zip(map(Path, paths), settings):
        if not (path / "results.json").is_file():
            sys.exit(f"eval.py: {path} is not finished; go on with it: python train.py --out {path} --resume")
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if (row["stage"], row["agent"]) == ("ppo", "mem1")]
        if not rows:
            sys.exit(f"eval.py: {path} has no PPO of the mem1 agent to compare; leave it away")
        group = groups.setdefault(", ".join(run[name] for name in apart) or "all", {})
        for i in range(4):  # the reward over each quarter of the iterations
            quarter = rows[len(rows) * i // 4 : len(rows) * (i + 1) // 4]
            group.setdefault(f"reward {i + 1}/4", []).append(float(np.mean([row["reward"] for row in quarter])))
        five = [np.mean([row["reward"] for row in rows[i : i + 5]]) for i in range(max(1, len(rows) - 4))]
        group.setdefault("to 0.8", []).append(next((i + 5.0 for i, mean in enumerate(five) if mean >= 0.8), math.inf))
        for name, pick in ("kl", np.mean), ("clip", np.mean), ("gap", np.max):
            group.setdefault(name, []).append(float(pick([row[name] for row in rows])))
        for n, cell in json.loads((path / "results.json").read_text())["mem1"].items():
            for name in "em", "peak":
                group.setdefault(f"{name}@{n}", []).append(cell[name])
    say(" " * 10 + "".join(f" | {name + ', ' + str(len(group['kl'])) + ' runs':26s}" for name, group in groups.items()))
    for name in next(iter(groups.values())):
        columns = [group.get(name, [float("nan")]) for group in groups.values()]
        say(f"{name:10s}" + "".join(f" | {np.mean(x):7.3g} ({min(x):7.3g} to {max(x):7.3g})" for x in columns))
    return {key: {name: [x if math.isfinite(x) else None for x in values] for name, values in group.items()} for key, group in groups.items()}


FARTHEST = 64  # objectives: beyond all that is trained, positions included


def collect(paths, say):
    """Finished runs as one: {"seeds": {seed: {method: {objectives: measures}}}, "memory", "failures", "curves", "meta"}.

    An agent of a larger model is told by how many times the parameters it has: `full-2x`. Of mem1 also the FARTHEST
    horizon is measured here, and what its state holds and why it fails at 16 objectives.
    """
    one, loaded, quiet = dict(seeds={}, memory={}, failures={}, curves={}, meta={}), [], lambda line: None
    for path in map(Path, paths):
        world, models = load_run(path)
        if not (path / "results.json").is_file():
            sys.exit(f"eval.py: {path} is not finished; go on with it: python train.py --out {path} --resume")
        loaded.append((path, world, models, sum(w.numel() for w in next(iter(models.values()))[1].values())))
    smallest = min(size for *_, size in loaded)
    for path, world, models, size in loaded:
        results, seed = json.loads((path / "results.json").read_text()), str(world.seed)
        larger = f"-{size / smallest:.0f}x" if size > 1.5 * smallest else ""
        rows, meta = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()], results.pop("meta")
        meta["minutes"] += undisturbed(rows) - rows[-1]["minutes"]
        one["meta"][path.name] = {**meta, "config": dict(vars(world))}
        mine = one["seeds"].setdefault(seed, {})
        for method, cells in results.items():
            if method + larger in mine:
                sys.exit(f"eval.py: {path}: there is another run of seed {seed} with {method}{larger} among these; give one of them")
            mine[method + larger] = cells
        rewards = one["curves"].setdefault(seed, {})
        for row in rows:
            if row["stage"] == "ppo":
                rewards.setdefault(row["agent"] + larger, []).append(round(row["reward"], 4))
        if "mem1" in results:
            n, episodes = min(FARTHEST, envs.farthest(world)), min(64, world.eval_episodes)
            say(f"{path}: {n} objectives, what the state holds, failures")
            trained = {name: pair for name, pair in methods(models).items() if name in ("mem1", "mem1-demos")}
            world.eval_objectives = [n]
            for method, cells in table(models, world, trained, quiet, episodes).items():
                mine[method] |= cells
            one["memory"][seed] = memory(models, world, trained, 16, episodes, quiet)
            one["failures"][seed] = failures(models, world, {"mem1": trained["mem1"]}, 16, 4 * episodes, quiet)["mem1"]
    return one


def undisturbed(rows):
    """Minutes that training took, had every step taken as long as the median one of its stage: what ran beside it for a while is left out."""
    steps = {}
    for before, row in zip([{"minutes": 0.0}, *rows], rows):
        steps.setdefault((row["stage"], row["agent"]), []).append(row["minutes"] - before["minutes"])
    return sum(len(times) * float(np.median(times)) for times in steps.values())


def report(one):
    """The README's tables, {name: markdown}, of what collect() returns: means over the seeds ± standard deviation."""
    seeds = one["seeds"]
    known = {method for cells in seeds.values() for method in cells}
    order = [method for agent in [*POLICIES, "truncate"] for method in sorted(known) if method.split("-")[0] == agent]
    order = [m for m in order if m in ("mem1-demos", "full-demos") or "-demos" not in m and m != "truncate-2x"]
    horizons = sorted({int(n) for cells in seeds.values() for rows in cells.values() for n in rows})
    three = [n for n in (2, 8, 16) if n in horizons]

    def cell(values, form):
        return f"{np.mean(values):{form}}" if len(values) else ""

    def spread(values, form):
        return cell(values, form) + (f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else "")

    def each_seed(method, n, value):
        return [value(cells[method][str(n)]) for cells in seeds.values() if str(n) in cells.get(method, {})]

    def by_method(columns, some_horizons):  # columns: {head: (value of a cell's measures, how to print it, cell or spread)}
        head = ["", *(f"{name} {n}".strip() for n in some_horizons for name in columns)]
        return grid(head, [[f"`{m}`", *(text(each_seed(m, n, value), form) for n in some_horizons for value, form, text in columns.values())] for m in order])

    em, f1, peak, dependency = map(itemgetter, ("em", "f1", "peak", "dependency"))
    ms = lambda r: 1e3 * r["time"]
    solved = lambda name, scale: lambda r: scale * r[name] / r["em"] if r["em"] else math.inf
    headline = []
    for seed, cells in seeds.items():
        a, b = (cells.get(name, {}).get("16") for name in ("mem1", "full"))
        if a and b:
            times = a["em"] / b["em"] if b["em"] else math.inf
            headline.append([seed, f"{a['em']:.2f}", f"{b['em']:.2f}", f"{times:.1f}", f"{a['peak']:.0f}", f"{b['peak']:.0f}", f"{b['peak'] / a['peak']:.1f}"])
    tables = {
        "table 1": by_method({"EM": (em, ".2f", spread), "F1": (f1, ".2f", spread), "peak": (peak, ".0f", spread), "ms": (ms, ".0f", cell)}, three),
        "em": by_method({"": (em, ".2f", spread)}, horizons),
        "peak": by_method({"": (peak, ".0f", spread)}, horizons),
        "single": by_method({"EM": (em, ".2f", spread), "F1": (f1, ".2f", spread), "peak": (peak, ".0f", spread),
                             "dependency": (dependency, ".0f", spread), "ms": (ms, ".1f", cell)}, [1]),
        "cost": by_method({"KB": (lambda r: r["kv_bytes"] / 1e3, ".0f", cell), "tokens / solved": (solved("tokens", 1), ".0f", cell),
                           "ms / solved": (solved("time", 1e3), ".0f", cell)}, three),
        "seeds": grid(["seed", "`mem1` EM of 16", "`full`", "times", "`mem1` peak", "`full`", "1 /"], headline),
        "growth": grid(["`mem1`", *horizons], [[text, *(cell(each_seed("mem1", n, lambda r: r[name]), form) for n in horizons)] for name, text, form in
                       (("state", "longest state", ".1f"), ("query", "longest query", ".1f"), ("info", "longest info", ".1f"),
                        ("answer", "answer", ".1f"), ("peak", "peak", ".1f"), ("right", "turns right", ".1%"))]),
    }
    states, slips = one["memory"].values(), one["failures"].values()
    turns = [t for t in (2, 3, 4, 6, 8, 12, 16, 20, 24) if all(str(t) in rows["mem1"] for rows in states)]
    tables["memory"] = grid(["turn", *turns], [[f"`{m}`: {text}", *(cell([rows[m][str(t)][name] for rows in states if str(t) in rows[m]], form) for t in turns)]
                            for m in ("mem1-demos", "mem1") for name, text, form in
                            (("found", "answers found", ".1f"), ("held", "of them in the state", ".0%"), ("right", "turns right", ".0%"))])
    causes = {cause: {name: [rows.get(cause, {}).get(name, 0) for rows in slips] for name in ("episodes", "lost")} for cause in set().union(*slips)}
    tables["failures"] = grid(["first slip", "episodes", "objectives lost"], [[cause, spread(x["episodes"], ".0f"), spread(x["lost"], ".0f")]
                              for cause, x in sorted(causes.items(), key=lambda item: (-sum(item[1]["lost"]), item[0]))])
    return tables


def grid(head, rows):
    """A markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def put_into_readme(one, path):
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end -->` by the tables of report()."""
    tables = report(one)
    text = re.sub(r"(<!-- table: ([\w ]+) -->\n).*?(?=<!-- end -->)", lambda m: f"{m[1]}\n{tables[m[2]]}\n\n", path.read_text(), flags=re.S)
    write_atomically(path, text.encode())


def publish(one, out):
    """results.json and the figures into `out`, the tables into the README beside it."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "results.json", json.dumps(one, indent=1).encode() + b"\n")
    if (readme := out.parent / "README.md").is_file():
        put_into_readme(one, readme)
    draw(one, out)


def draw(one, out):
    """scaling.png, EM and peak over the horizon; training.png, the reward and what the state holds. None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return tqdm.write("no figures: matplotlib is not installed (pip install matplotlib); the tables say the same")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    order = "mem1 mem1-demos full full-2x separate window notes amnesic truncate".split()
    color = dict(zip(order, "tab:blue tab:cyan tab:red tab:pink tab:purple tab:green tab:olive tab:gray tab:brown".split()))
    names = {"mem1-demos": "mem1 before PPO", "full-2x": "full, twice the weights"}
    trained = max(run["config"]["objectives"][1] for run in one["meta"].values())

    def lines(axis, runs, method):
        """runs [{x: y}, ...], one a seed: a line for the mean, a band from the lowest to the highest."""
        x = sorted(set.intersection(*map(set, runs))) if runs else []
        if x:
            y = np.array([[run[i] for i in x] for run in runs])  # (seeds, x)
            axis.plot(x, y.mean(0), marker="o" if len(x) < 20 else None, markersize=3, color=color[method], label=names.get(method, method))
            axis.fill_between(x, y.min(0), y.max(0), alpha=0.2, color=color[method])

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    for axis, name, title in (left, "em", "questions answered exactly"), (right, "peak", "peak tokens in context (log scale)"):
        for method in order:
            lines(axis, [{int(n): r[name] for n, r in cells[method].items()} for cells in one["seeds"].values() if method in cells], method)
        axis.axvspan(1, trained, color="0.93", zorder=0, label=f"trained: 1 to {trained}")
        axis.set(xscale="log", xlabel="questions in the task", title=title)
        axis.set_xticks([1, 2, 4, 8, 16, 32, 64], "1 2 4 8 16 32 64".split())
    left.plot(range(1, 13), range(1, 13), color="0.6", linestyle="--", linewidth=1, label="all of them")
    right.set_yscale("log")
    right.set_yticks([30, 50, 100, 200, 500, 1000], "30 50 100 200 500 1000".split())
    for axis in left, right:
        axis.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="center left", bbox_to_anchor=(0.91, 0.5), title="bands: all seeds", title_fontsize=8)
    figure.savefig(out / "scaling.png", dpi=120, bbox_inches="tight")

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    smooth = lambda y, k=3: [float(np.mean(y[max(0, i - k) : i + k + 1])) for i in range(len(y))]
    for method in order:
        lines(left, [dict(enumerate(smooth(cells[method]))) for cells in one["curves"].values() if method in cells], method)
    for method in "mem1", "mem1-demos":
        lines(right, [{int(t): row["held"] for t, row in cells[method].items() if 2 <= int(t) <= 24} for cells in one["memory"].values()], method)
    left.set(xlabel="PPO iteration (mean over seven)", title=f"reward: share of 1 to {trained} questions answered")
    right.set(xlabel="turn (16 questions)", title="share of the answers found that the state holds", ylim=(0, 1.05))
    handles = {label: handle for axis in (right, left) for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, fontsize=8, loc="center left", bbox_to_anchor=(0.91, 0.5), title="bands: all seeds", title_fontsize=8)
    figure.savefig(out / "training.png", dpi=120, bbox_inches="tight")
    plt.close("all")


# ----------------------------------------------------------------------------------------------
# Speed. One core, one thread, all in one process; what is compared takes turns, and is asserted to be the same work.

GIVEN, WRITTEN, TURNS, SIDE_BY_SIDE = 24, 24, 6, 64  # tokens read and written in a turn; turns; episodes


class Metronome:
    """So many turns of as many tokens written, and 24 read, after a task of so many tokens, whatever is written: no luck in what is timed."""

    def __init__(self, turns=TURNS, written=WRITTEN, task=64):
        self.left, self.done, self.gains, self.cause, self.em, self.prompt = turns, False, [0.0] * turns, None, 0, " jelo" * (task - 1)
        self.n_objectives = 8 if written % 16 == 0 else 4
        self.width = written // (8 + self.n_objectives) - 2
        assert core.turn_cap(self) == written  # nothing ends a turn but its cap

    def step(self, kind, text):
        self.left -= 1
        self.done = self.left == 0
        return " jelo" * (GIVEN - 1)


class Lines:
    """Stands where a generator of random numbers is expected: its numbers are what an actor is to write, a turn a call."""

    def __init__(self, turns):
        self.turns = iter(turns)

    def random(self, cap):
        ids = next(self.turns).written
        return 1 - (np.pad(ids, (0, cap - len(ids))) + 0.5) / ENC.n_vocab


def recite(logits, uniform):
    """mem1.sample with Lines: it does its work, and then takes the token that the number stands for."""
    sample(logits, uniform)
    ids = (uniform * ENC.n_vocab).long()  # (B,)
    return ids, logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


def acted_out(model, world, n, episodes, policy):
    """An untrained model plays as a trained one would: it writes what the demonstrator wrote. Trajectories; their
    seconds, turn by turn; the cache."""
    make = lambda: [envs.make(world, n, [0, TEST, n, j, 0]) for j in range(episodes)]
    lines = [Lines(demonstrate(env, policy).turns) for env in make()]
    starts, caches = [], []  # of the task and of each turn; the one that was made
    with instead(core, sample=recite, Cache=lambda *a: caches.append(Cache(*a)) or caches[0],
                 feed=lambda *a, feed=core.feed: starts.append(time.perf_counter()) or feed(*a)):
        trajs = rollout(model, make(), policy, lines)
    assert all(traj.env.em == n for traj in trajs), "the demonstrator was not repeated"
    return trajs, np.diff([*starts[1:], time.perf_counter()]), caches[0]


@contextlib.contextmanager
def instead(owner, **functions):
    """Other functions in a module, for a while."""
    before = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(owner, name, function)


def paired(ours, theirs, pairs=5):
    """Both in turn, after one of each to warm up: (their seconds, our seconds) of each pair."""
    seconds = []
    for _ in range(pairs + 1):
        row = []
        for work in theirs, ours:
            began = time.perf_counter()
            work()
            row.append(time.perf_counter() - began)
        seconds.append(row)
    return np.array(seconds[1:])  # (pairs, 2)


def floor(trajs, model, peak, bandwidth):
    """Seconds that a rollout would take if it were matrix products at their peak and reading at full bandwidth, no more."""
    weights = sum(p.numel() for p in model.blocks.parameters()) + model.emb.weight.numel()
    encoded = sum(len(t.task) + sum(len(b.ids) for b in t.branches) for t in trajs)
    read = sum(len(t.task) + seen + k for t in trajs for seen, wrote in t.spans for k in range(wrote))  # keys that decoding looks at
    steps = max(sum(wrote for _, wrote in t.spans) for t in trajs)
    C, nl = model.config.n_embd, model.config.n_layer
    return (2 * weights * encoded + 4 * nl * C * read) / peak + (4 * weights * steps + 8 * nl * C * read) / bandwidth


def flops(model, trajs):
    """Floating point operations of one forward and backward pass over trajectories, each token once (6 N + attention)."""
    C, nl = model.config.n_embd, model.config.n_layer
    blocks, tokens, pairs, trained = sum(p.numel() for p in model.blocks.parameters()), 0, 0, 0
    for traj in trajs:
        P = len(traj.task)
        pairs += P * (P + 1) // 2 + sum(len(b.ids) * P + len(b.ids) * (len(b.ids) + 1) // 2 for b in traj.branches)
        tokens += P + sum(len(b.ids) for b in traj.branches)
        trained += traj.n_trained
    return 3 * (2 * blocks * tokens + 4 * nl * C * pairs + 2 * C * ENC.n_vocab * trained)


class Rows:
    """The past of rows (B, T) that share nothing: as most train."""

    def before(self, i, h):
        return [torch.nn.functional.pad(h, (0, 0, j, -j)) for j in (3, 2, 1)]  # each (B, T, C)

    def attend(self, i, q, k, v):
        see = torch.ones(1, q.size(1), q.size(1), dtype=torch.bool, device=q.device).tril()  # (1, T, T)
        return attend(*(x.transpose(1, 2) for x in (q, k, v)), as_bias(see))


def a_row_a_turn(model, trajs, budget):
    """What MemAgent, verl-agent and others train on: each turn is a sequence of its own, task and all. Sum of logp, with gradients."""
    rows = [(traj.task + branch.ids, [False] * len(traj.task) + branch.trained) for traj in trajs for branch in traj.branches]
    rows.sort(key=lambda row: len(row[0]))
    summed = 0.0
    while rows:
        S, chunk = len(rows[-1][0]), []
        while rows and (not chunk or S * len(chunk) < budget):
            chunk.append(rows.pop())
        ids = torch.tensor([r + [0] * (S - len(r)) for r, _ in chunk])  # (R, S)
        at = torch.tensor([b * S + t - 1 for b, (_, trained) in enumerate(chunk) for t in np.flatnonzero(trained)])  # (M,)
        x = model(ids, torch.arange(S).expand(len(chunk), S), Rows()).flatten(0, 1)[at]  # (M, C)
        logp = model.logits(x).log_softmax(-1).gather(-1, ids.flatten()[at + 1][:, None]).sum()
        (logp + model.value(x).sum()).backward()
        summed += logp.item()
    return summed


def a_tree(model, trajs, budget):
    """The same, each task encoded once."""
    summed = 0.0
    for p in pack(trajs, budget):
        logp, value, _ = evaluate(model, p)
        (logp.sum() + value.sum()).backward()
        summed += logp.sum().item()
    return summed


def by_turns(worlds, policy, rngs, write_turn):
    """Episodes of equal length, of which `write_turn` (contexts (B, L), uniform (B, n)) -> ids (B, n) writes the turns."""
    trajs = [Trajectory(env, [TASK, *ENC.encode_ordinary(env.prompt)]) for env in worlds]
    while not trajs[0].env.done:
        for traj in trajs:
            traj.open_turn(policy)
        contexts = torch.tensor([traj.task + traj.branches[-1].ids for traj in trajs])  # (B, L)
        uniform = torch.tensor(np.stack([1 - rng.random(core.turn_cap(traj.env)) for rng, traj in zip(rngs, trajs)]), dtype=torch.float32)
        for traj, ids in zip(trajs, write_turn(contexts, uniform).tolist()):
            traj.close_turn(ids)
    return trajs


@torch.no_grad()
def without_a_cache(model, contexts, uniform):
    """nanoGPT's way: all is encoded again for each token."""
    for k in range(uniform.size(1)):
        B, L = contexts.shape
        x = model(contexts, torch.arange(L).expand(B, L), Rows())[:, -1]  # (B, C)
        contexts = torch.cat([contexts, sample(model.logits(x), uniform[:, k])[0][:, None]], 1)
    return contexts[:, -uniform.size(1) :]


def bench(say, peers, quick):
    """All measurements, {name: number}; a line said for each. quick: small, for a test."""
    import train
    cfg = train.Config(device="cpu", dtype="float32")
    pairs, cfg.ppo_batch = (1, 4) if quick else (5, SIDE_BY_SIDE)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.manual_seed(0)
    model = GPT(GPTConfig(ENC.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd))
    endless = GPT(model.config)  # its turns do not end before their cap
    endless.logits = lambda x: GPT.logits(endless, x).index_fill(-1, torch.tensor([END]), -1e9)
    long = torch.randn(2**24)
    bandwidth = 2 * 4 * len(long) / least_seconds(long.clone)
    say(f"one core: {gemm_peak() / 1e9:.0f} GFLOP/s in a product of 1024 x 1024, {bandwidth / 1e9:.1f} GB/s in a copy; load before: {os.getloadavg()[0]:.1f}")
    found = dict(rollout_vs_hf=None, update_vs_trl=None)
    found |= bench_rollout(endless, bandwidth, cfg, pairs, say)
    found |= bench_learner(model, endless, cfg, pairs, say)
    found |= bench_iteration(model, cfg, 1 if quick else 3, say)
    found |= bench_horizon(cfg, (2, 4) if quick else (2, 4, 8, 16, 32, 64), say)
    return found | (against_peers(cfg, endless, pairs, say) if peers else {})


def least_seconds(work):
    """Of five times."""
    return min(timeit.repeat(work, number=1))


def gemm_peak():
    """Floating point operations a second in the product of two large matrices."""
    a, b = torch.randn(2, 1024, 1024)
    return 2 * 1024**3 / least_seconds(lambda: a @ b)


def ratio(say, name, seconds, text):
    """The median ratio of seconds (pairs, 2), said with its range."""
    ratios = seconds[:, 0] / seconds[:, 1]
    say(f"{name:22s} {np.median(ratios):6.2f} times   ({ratios.min():.2f} to {ratios.max():.2f}, {len(ratios)} pairs)   {text}")
    return float(np.median(ratios))


def metronomes(episodes, turns=TURNS):
    """What rollout() needs for so many episodes of a Metronome."""
    return [Metronome(turns) for _ in range(episodes)], mem1, [np.random.default_rng(i) for i in range(episodes)]


def bench_rollout(endless, bandwidth, cfg, pairs, say):
    """Sampling, against what the machine could do at most, and against sampling without a cache."""
    episodes = cfg.ppo_batch
    ours, slow = lambda: rollout(endless, *metronomes(episodes, 2)), lambda: by_turns(*metronomes(episodes, 2), partial(without_a_cache, endless))
    text = lambda trajs: [[turn.written for turn in traj.turns] for traj in trajs]
    assert text(ours()) == text(slow()), "with a cache and without, the same must be written"
    seconds = paired(ours, slow, pairs)
    rate = episodes * 2 * WRITTEN / np.median(seconds[:, 0])
    without = ratio(say, "rollout_vs_nocache", seconds, f"{episodes} episodes of 2 turns; the same tokens, {rate:.0f} a second without a cache")
    trajs = rollout(endless, *metronomes(episodes))
    took, least = least_seconds(lambda: rollout(endless, *metronomes(episodes))), floor(trajs, endless, gemm_peak(), bandwidth)
    speed = episodes * TURNS * WRITTEN / took
    say(f"rollout: {speed:.0f} tokens a second, {least / took:.0%} of what products and memory traffic alone would allow")
    return dict(rollout_vs_nocache=without, rollout_tok_s=speed, rollout_of_floor=least / took)


def bench_learner(model, endless, cfg, pairs, say):
    """A forward and a backward pass over whole episodes, against one sequence a turn: of our own tasks, and of tasks
    and states as long as plain words would make them."""
    found = {"mfu": 0.0}
    acted = {n: acted_out(model, cfg, n, (cfg.ppo_batch * 2 + n) // n, mem1)[0] for n in (2, 16)}
    for turns, written, task in (6, 24, 64), (16, 48, 160):
        worlds = [Metronome(turns, written, task) for _ in range((cfg.ppo_batch * 4 + turns) // turns)]
        acted[f"{task}x{turns}"] = rollout(endless, worlds, mem1, [np.random.default_rng(i) for i in range(len(worlds))])
    for n, trajs in acted.items():
        tree, rows = partial(a_tree, model, trajs, cfg.pack_tokens), partial(a_row_a_turn, model, trajs, cfg.pack_tokens)
        assert abs(tree() / rows() - 1) < 1e-4, "both must be the same loss"
        seconds = paired(tree, rows, pairs)
        tokens, of_peak = sum(len(t.task) + sum(len(b.ids) for b in t.branches) for t in trajs), flops(model, trajs) / seconds[:, 1].min() / gemm_peak()
        name = f"learner_vs_per_turn_{n}"
        found[name] = ratio(say, name, seconds, f"{tokens / np.median(seconds[:, 1]):.0f} tokens a second, {of_peak:.0%} of the peak of products")
        if n in (2, 16):
            found["mfu"] = max(of_peak, found["mfu"])
    return found


def bench_iteration(model, cfg, n, say):
    """Where the time of n PPO iterations goes."""
    import train
    learner, reference = train.Learner(model), GPT(model.config)
    optimiser, spent = torch.optim.AdamW(model.parameters(), lr=1e-9), dict.fromkeys(("act", "sample", "make", "learn"), 0.0)

    def timed(name, function):
        def wrapped(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - began
            return result
        return wrapped

    def iteration():
        return train.reinforce(cfg, learner, optimiser, reference, mem1, [train.world(cfg, 0, train.PPO, 0, i) for i in range(cfg.ppo_batch)], 0, 0, 1)

    scripts = [demonstrate(train.world(cfg, 0, train.PPO, 0, i), mem1).turns for i in range(cfg.ppo_batch)]
    repeat = lambda model, worlds, policy, rngs: rollout(model, worlds, policy, [Lines(turns) for turns in scripts])
    with instead(core, sample=recite, feed=timed("sample", core.feed), write=timed("sample", core.write)):
        with instead(train, rollout=timed("act", repeat), optimise=timed("learn", train.optimise),
                     **{name: timed("make", getattr(train, name)) for name in ("pack", "world", "exercise")}):
            iteration()
            spent.update(dict.fromkeys(spent, 0.0))
            began = time.perf_counter()
            for _ in range(n):
                iteration()
            whole = time.perf_counter() - began
    parts = {"sampling": spent["sample"], "forward, backward, step": spent["learn"], "worlds, packing, Python": spent["act"] - spent["sample"] + spent["make"]}
    parts["reference, advantages, the rest"] = whole - sum(parts.values())
    say(f"a PPO iteration of {cfg.ppo_batch} episodes: {whole / n:.2f} s: " + ", ".join(f"{name} {part / whole:.0%}" for name, part in parts.items()))
    return dict(env_share=parts["worlds, packing, Python"] / whole, iteration_s=whole / n)


def bench_horizon(cfg, horizons, say):
    """Memory, and time a turn, over the horizon."""
    found, slot = {}, 2 * 4 * cfg.n_layer * cfg.n_embd  # bytes a token
    say(f"{'task':6s} {'agent':5s} {'objectives':>10s} {'KB of cache beside the task':>28s} {'MB of memory at peak':>21s} {'ms a turn, first':>17s} {'last':>6s}")
    for kind, name in ("count", "mem1"), ("list", "mem1"), ("list", "full"):
        world = replace(cfg, kinds=[kind])
        ENC.add(envs.words_of(world))
        model, key = GPT(GPTConfig(ENC.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd)), "" if (kind, name) != ("list", "mem1") else "_list"
        beside, turn = [], []
        for n in horizons:
            peak_memory(reset=True)
            trajs, seconds, cache = acted_out(model, world, n, 8, POLICIES[name])
            beside.append((cache.bytes - slot * len(trajs) * max(len(t.task) for t in trajs)) / 8 / 1e3)
            shown = min(len(t.turns) for t in trajs)  # while all play
            turn.append((np.median(seconds[1 : 1 + shown // 3 + 1]), np.median(seconds[shown - shown // 3 - 1 : shown])))
            say(f"{kind:6s} {name:5s} {n:10d} {beside[-1]:28.0f} {peak_memory():21.0f} {turn[-1][0] * 1e3:17.1f} {turn[-1][1] * 1e3:6.1f}")
        found[f"cache_growth_{name}{key}"] = beside[-1] / beside[0]
        found[f"turn_growth_{name}{key}"] = float(turn[-1][1] / turn[-1][0])
    return found


def against_peers(cfg, endless, pairs, say):
    """The same work by transformers (generate) and by TRL (PPO, 1.12.0 is the last release that has it), where they are installed."""
    try:
        import transformers
    except ImportError:
        say("transformers is not installed: not compared (pip install transformers==5.23.0 trl==1.12.0)")
        return {}
    transformers.utils.logging.set_verbosity_error()
    C, V, size = cfg.n_embd, ENC.n_vocab, sum(p.numel() for p in endless.parameters())
    shape = dict(vocab_size=V, hidden_size=C, intermediate_size=8 * C // 3, num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
                 tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None, max_position_embeddings=4096, use_cache=True)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    theirs = sum(p.numel() for p in llama.parameters())
    assert abs(theirs / size - 1) < 0.01, f"models of {theirs} and {size} weights"

    def generate(contexts, uniform):
        n = uniform.size(1)
        ids = llama.generate(contexts, attention_mask=torch.ones_like(contexts), max_new_tokens=n, min_new_tokens=n, do_sample=True,
                             temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
        return ids[:, contexts.size(1) :]

    episodes = cfg.ppo_batch
    ours, their = lambda: rollout(endless, *metronomes(episodes)), lambda: by_turns(*metronomes(episodes), generate)
    written = lambda trajs: sum(len(turn.written) for traj in trajs for turn in traj.turns)
    assert written(their()) == written(ours()) == episodes * TURNS * WRITTEN
    text = f"{episodes} episodes of {TURNS} turns; transformers {transformers.__version__} generate, {theirs} weights against {size}"
    return dict(rollout_vs_hf=ratio(say, "rollout_vs_hf", paired(ours, their, pairs), text), update_vs_trl=against_trl(cfg, endless, shape, pairs, say))


def against_trl(cfg, endless, shape, pairs, say):
    """One PPO update by TRL, of models of this shape. None if it is not installed."""
    import train
    import transformers
    try:
        import datasets
        from tokenizers import Tokenizer, models
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        import trl
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError:
        return say("trl 1.12.0 is not installed: PPO not compared")  # None
    E, N, V, size = max(8, cfg.ppo_batch // 2), 64, shape["vocab_size"], sum(p.numel() for p in endless.parameters())  # episodes; tokens of the task and of the answer
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(V + 2)}, unk_token="0")),
                                                 pad_token=str(V), eos_token=str(V + 1), padding_side="left")  # neither is ever sampled
    tasks = datasets.Dataset.from_dict({"input_ids": np.random.default_rng(0).integers(0, V, (E, N)).tolist()})
    head = lambda layers: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**{**shape, "num_hidden_layers": layers, "num_labels": 1}))

    def their_update():
        with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            args = PPOConfig(output_dir=out, total_episodes=E, per_device_train_batch_size=E, num_mini_batches=1, num_ppo_epochs=1, response_length=N,
                             temperature=1.0, local_rollout_forward_batch_size=E, num_sample_generations=0, save_strategy="no", report_to=[], use_cpu=True,
                             bf16=False, gradient_checkpointing=False, disable_tqdm=True, missing_eos_penalty=None, stop_token=None, learning_rate=1e-5)
            policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
            trainer = PPOTrainer(args, words, policy, copy.deepcopy(policy), head(1), tasks, head(cfg.n_layer), eval_dataset=tasks.select(range(1)))
            began = time.perf_counter()
            trainer.train()
            return time.perf_counter() - began

    ppo = replace(cfg, ppo_batch=E, ppo_epochs=1, ppo_minibatches=1, ppo_primer=0)
    reference, optimiser = GPT(endless.config), torch.optim.AdamW(endless.parameters(), lr=1e-5)

    def our_update():
        began = time.perf_counter()
        row = train.reinforce(ppo, train.Learner(endless), optimiser, reference, mem1, [Metronome(1, N) for _ in range(E)], 0, 0, 1)
        assert row["tokens"] == E * N and row["gap"] < 1e-4
        return time.perf_counter() - began

    seconds = np.array([(their_update(), our_update()) for _ in range(pairs + 1)][1:])
    text = f"{E} episodes of one turn, {N} tokens read, {N} written; trl {trl.__version__}, policy and critic of {size} weights each"
    return ratio(say, "update_vs_trl", seconds, text)


def peak_memory(reset=False):
    """Most memory in use (MB) since the last reset; nan where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    except OSError:
        return math.nan


def provenance():
    """What the numbers depend on besides the seed: code and machine."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    return dict(commit=commit or "unknown", machine=f"{platform.machine()}, {os.cpu_count()} cores",
                python=platform.python_version(), torch=torch.__version__)


CHECKPOINTS = "checkpoint.pt", "previous.pt"  # the last one of a run, and the one before it


def load_run(path):
    """(its configuration, its models) of a run's directory; exits with one line if there is no such run."""
    import train  # which imports this file

    def error(problem):
        raise ValueError(problem)

    config = Path(path) / "config.json"
    if not config.is_file():
        sys.exit(f"eval.py: {config} does not exist; expected the directory of a run of train.py, such as runs/cpu")
    try:
        world = train.Config(**{**vars(train.Config()), **train.read_config(config, error, whole=False)})
        world.facts = world.facts and str(Path(path) / Path(world.facts).name)  # the run's own copy
        train.check(world, error)
        ENC.add(envs.words_of(world))
        state, told = last_state(path, world)
    except (OSError, ValueError) as problem:
        sys.exit(f"eval.py: {path}: {problem}")
    for line in told:
        print(f"eval.py: {line}", file=sys.stderr)
    return world, state["models"]


def last_state(path, world):
    """(state of a run in its last checkpoint that is whole, [what is wrong with a later one]). ValueError if there is none."""
    told = []
    for name in CHECKPOINTS:
        try:
            state = restore(Path(path) / name)
            if wrong := misfit(state, world):
                raise ValueError(f"{Path(path) / name}: its {wrong} is not such as a run with this config.json has")
            return state, [f"{line}; the one before is taken instead" for line in told]
        except ValueError as problem:
            told.append(str(problem))
    raise ValueError("; ".join(told))


def misfit(state, world):
    """The name of what in a checkpoint does not fit the configuration of its run; None if all does."""
    kinds = dict(stage=int, step=int, skipped=int, seconds=float, models=dict)
    if not isinstance(state, dict) or {*state} != {*kinds, "model", "optimiser", "best"}:
        return "list of contents"
    for name, kind in kinds.items():
        if type(state[name]) is not kind or kind is not dict and not 0 <= state[name] < 2**40:
            return name

    def fit(weights):
        table = weights.get("emb.weight") if isinstance(weights, dict) else None
        words = len(table) if isinstance(table, torch.Tensor) and table.dim() else 0  # more may have been added since
        return 0 < words <= ENC.n_vocab and fits(weights, GPTConfig(words, world.n_layer, world.n_head, world.n_embd))

    for name, saved in state["models"].items():
        if not isinstance(saved, list) or len(saved) != 2 or not fit(saved[1]):
            return f"model {name}"
        if not isinstance(saved[0], dict) or any(type(number) is not int for number in saved[0].values()):
            return f"model {name}"
        if saved[0] != vars(GPTConfig(len(saved[1]["emb.weight"]), world.n_layer, world.n_head, world.n_embd)):
            return f"model {name}"
    model, optimiser, best = state["model"], state["optimiser"], state["best"]
    if model is not None and not fit(model):
        return "model"
    if best is not None and not (isinstance(best, list) and len(best) == 2 and type(best[0]) is float and fit(best[1])):
        return "best"
    if model is None or optimiser is None:
        return None if model is optimiser else "optimiser"
    shapes = lambda x: x.shape if isinstance(x, torch.Tensor) else {k: shapes(v) for k, v in x.items()} if isinstance(x, dict) else None
    moments = {i: dict(step=(), exp_avg=w.shape, exp_avg_sq=w.shape) for i, w in enumerate(model.values())}
    fresh = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"][0]
    if not isinstance(optimiser, dict) or {*optimiser} != {"state", "param_groups"} or shapes(optimiser["state"]) not in (moments, {}):  # {}: no step yet
        return "optimiser"
    (group, *others) = optimiser["param_groups"] if isinstance(optimiser["param_groups"], list) and optimiser["param_groups"] else [None]
    if others or not isinstance(group, dict) or {*group} != {*fresh} or group["params"] != [*range(len(model))]:
        return "optimiser"
    return None


def numbers(text):
    """"2,16" -> [2, 16], for argparse."""
    values = [int(n) for n in text.split(",")]
    if not all(1 <= n <= len(envs.INDICES) for n in values):
        raise ValueError
    return values


def parse_arguments():
    """The command line, and the parser, to say what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"eval.py: {message} (python eval.py --help lists the flags)\n")
    parser.add_argument("run", nargs="?", help="directory of a run, e.g. runs/cpu")
    parser.add_argument("--policies", help="comma-separated, e.g. mem1,full-demos; default: all that the run has")
    parser.add_argument("--objectives", type=numbers, help="comma-separated horizons, e.g. 2,16; default: the run's")
    parser.add_argument("--episodes", type=int, help="episodes a cell; default: the run's")
    parser.add_argument("--show", type=int, metavar="K", help="print K trajectories instead of the table")
    parser.add_argument("--env", choices=envs.ENVS, help="play in this world, trained for or not; default: the run's")
    parser.add_argument("--kinds", type=lambda text: text.split(","), help="comma-separated kinds of tasks, e.g. count,compare; default: the run's")
    parser.add_argument("--ask", metavar="TEXT", help='questions to an agent trained with --facts: "Japan capital; Peru continent"')
    parser.add_argument("--failures", action="store_true", help="why objectives were lost, by cause, instead of the table")
    parser.add_argument("--memory", action="store_true", help="what the state holds, by turn, instead of the table")
    parser.add_argument("--layouts", action="store_true", help="compare what layouts would train with what acted, instead of the table")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="PPO of several runs, those of like settings together")
    parser.add_argument("--table", nargs="+", metavar="RUN", help="all tables of several runs, as markdown")
    parser.add_argument("--assets", metavar="DIR", help="with --table: write results.json and figures there, and the tables into the README beside it")
    parser.add_argument("--bench", action="store_true", help="how fast all is, on one core")
    parser.add_argument("--peers", action="store_true", help="with --bench: also against transformers and trl, where they are installed")
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for name in "threads", "episodes", "show":
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.device not in ("cpu", "cuda") or args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: expected cpu, or cuda where torch finds a GPU")
    if args.assets and not args.table:
        parser.error("--assets goes with --table")
    if args.peers and not args.bench:
        parser.error("--peers goes with --bench")
    return args, parser


def main():
    """What the flags ask for, else the table of a run."""
    args, parser = parse_arguments()
    torch.set_num_threads(args.threads)
    say = (lambda line: None) if args.json else tqdm.write
    if args.bench:
        results = bench(say, args.peers, args.episodes == 1)
        return print(json.dumps(results)) if args.json else None
    if args.compare:
        results = compare(args.compare, say)
        return print(json.dumps(results)) if args.json else None
    if args.table:
        results = collect(args.table, say)
        for name, text in report(results).items():
            say(f"\n{name}\n\n{text}")
        if args.assets:
            publish(results, Path(args.assets))
        return print(json.dumps(results)) if args.json else None
    if not args.run and not args.layouts:
        parser.error("no run given; expected the directory of a run of train.py, such as runs/cpu")
    torch.manual_seed(0)
    world, models = load_run(args.run) if args.run else (None, {"mem1": None})
    if world and (args.env or args.kinds):
        import train
        if args.env not in (None, world.env):  # what belonged to the world before
            world.facts, world.names, world.kinds = "", len(envs.NAMES), ["list"]
        world.env, world.kinds = args.env or world.env, args.kinds or world.kinds
        world.eval_objectives = args.objectives or [n for n in world.eval_objectives if n <= envs.farthest(world)]
        train.check(world, parser.error)
    most = envs.farthest(world) if world else len(envs.INDICES)
    if args.objectives and max(args.objectives) > most:
        parser.error(f"--objectives {max(args.objectives)}: in the world of this run there are names for at most {most}")
    have = methods(models)
    chosen = {name: have[name] for name in args.policies.split(",") if name in have} if args.policies else have
    if args.policies and len(chosen) < len(args.policies.split(",")):
        parser.error(f"--policies {args.policies}: the run has {', '.join(have) or 'none yet'}")

    if args.layouts and args.run and "mem1" not in models:
        parser.error(f"--layouts: {args.run} has no trained mem1 agent; expected one that has")
    if args.layouts:
        model = load(models["mem1"], args.device) if args.run else GPT(GPTConfig(ENC.n_vocab)).to(args.device)
        results = layouts(model, world, args.objectives or [2, 4, 8, 16], args.episodes or 64, say)
    elif args.memory and (world.env == "shop" or {*envs.REDUCED} & {*world.kinds}):
        parser.error("--memory counts the answers that a state holds; in this world it holds none; give --kinds list, or --env")
    elif args.failures or args.memory:
        n = args.objectives[0] if args.objectives else 16
        results = (failures if args.failures else memory)(models, world, chosen, n, args.episodes or 64, say, args.device)
    elif args.ask is not None:
        if not world.facts:
            parser.error(f"--ask: {args.run} knows an invented world only, other facts in each episode; train with --facts FILE")
        (model, policy), *_ = chosen.values()
        try:
            return ask(load(models[model], args.device), policy, world, args.ask)
        except ValueError as problem:
            parser.error(f"--ask: {problem}")
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
        say(trend(results))
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
