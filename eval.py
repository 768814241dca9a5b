"""eval.py: how well the agents of a run do, and at which cost in memory, at horizons never trained.

    python eval.py runs/cpu                  # the trend: 1, 2, 4, 8, 16, 32 objectives
    python eval.py runs/cpu --show 2         # two episodes, turn by turn: what is kept, new, pruned
    python eval.py runs/cpu --failures       # why objectives were lost at 16, by first mistake
    python eval.py runs/cpu --memory         # what the state holds at 16, turn by turn
    python eval.py --table runs/*-seed-?     # all tables, from several seeds, as markdown

Greedy decoding. Test episodes come from keys that no training and no validation episode has.

    em, f1      objectives answered exactly, and their token F1, summed over the objectives (0..N)
    peak        most tokens in context over the turns, prompt not counted, as in the paper; averaged
                over all episodes (the paper's code averages over those with some success)
    dependency  tokens that all written tokens looked back on, prompt not counted (app. A.4)
    turns       exchanges with the environment
    valid       share of turns that are well-formed
    right       share of turns that are, word for word, what the demonstrator would write, given
    what
                the agent saw
    time        seconds an episode, many played side by side
    kv_bytes    key-value memory allocated for an episode, prompt included
    tokens      encoded in an episode, read and written, prompt included
    state, query, info, answer   the longest of the episode, in tokens
"""
import argparse
import difflib
import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import envs
from envs import Stream
from mem1 import ENC, POLICIES, expert, parse
from train import load_model, load_run, measure, methods, play, table, trend

# ----------------------------------------------------------------------------------------------
# One episode


def show(traj, policy, color=False):
    """Print an episode turn by turn: `-` pruned since the last turn, `=` kept, `+` written now."""
    def paint(code, text):
        print(f"\033[{code}m{text}\033[0m" if color else text)

    paint("1", f"task   {ENC.decode(traj.prompt)}")
    before = []
    for t, turn in enumerate(traj.turns):
        kept = policy(traj.turns[:t]) if t else []
        pruned = []
        for op, a, b, _, _ in difflib.SequenceMatcher(None, before, kept, False).get_opcodes():
            if op != "equal":
                pruned += before[a:b]
        print(f"turn {t + 1}")
        now = turn.state + turn.action
        for mark, code, ids in ("-", "2;9", pruned), ("=", "36", kept), ("+", "1;32", now):
            if ids:
                paint(code, f"     {mark} {ENC.decode(ids)}")
        before = kept + now + turn.info
    env = traj.env
    golds = " ".join(f"{index} {gold}" for index, gold in env.golds)
    print(f"       {env.cause}; the right answer is {golds}: em {env.em}/{env.n_objectives}, "
          f"peak {traj.peak} tokens\n")


def first_mistake(traj, policy):
    """(cause, turn, written, right) of the first turn that is not what the demonstrator would have
    written, given what the agent saw; None if there is no such turn."""
    for t, turn in enumerate(traj.turns):
        right = expert(traj.env, policy, traj.turns[:t])
        cause = difference(turn.written, right)
        if cause:
            return cause, t + 1, ENC.decode(turn.written), ENC.decode(right)
    return None


def difference(written, right):
    """The cause of a mistake, in a few words; None if only the wording differs."""
    got, want = dissect(written), dissect(right)
    lost = want.entries.keys() - got.entries.keys()
    invented = got.entries.keys() - want.entries.keys()
    causes = [
        (got.kind == "malformed", "malformed, or cut off"),
        (got.kind != want.kind, "stopped early" if got.kind == "answer" else "did not stop"),
        (got.kind == "query" and want.index and not got.index, "lost the question"),
        # an open question written as an answer, or an answer as an open question:
        (want.index in got.entries or got.index in want.entries, "wrong hop"),
        (lost, "lost an entry"),
        (invented, "made up an entry"),
        (got.entries != want.entries, "changed an entry"),
        (got.index != want.index, "took up another question"),
        (got.question != want.question, "wrong hop"),
        (got.kind == "query" and got.text != want.text, "wrong hop"),
        (got.then != want.then, "wrong next question"),
        # a count, what a user said, the best product so far; or an entry twice:
        (got.words != want.words and got.kind == "answer", "wrong answer"),
        (got.words != want.words, "remembers something else"),
    ]
    return next((cause for is_so, cause in causes if is_so), None)


def dissect(ids):
    """What a turn says: its question at hand, its list."""
    kind, state, _, text = parse(ids)
    state = ENC.decode(state)
    stated = re.findall(envs.OPEN, state)
    index, subject, relations, then = stated[-1] if stated else ("", "", "", "")
    listed = text if kind == "answer" else state.partition(envs.LIST)[2]
    return SimpleNamespace(
        kind=kind, text=text, index=index, then=then,
        question=(subject, relations, state.count(":")),
        entries=dict(re.findall(envs.ENTRY, listed)), words=sorted(envs.words(listed)))


# ----------------------------------------------------------------------------------------------
# Many episodes


def failures(trajs, policy):
    """Episodes that lost objectives, by the cause of their first mistake, with an example of each:
    {cause: {episodes, lost, turn, example}}, turn being the mean."""
    causes = {}
    for traj in trajs:
        lost = traj.env.n_objectives - traj.env.em
        if lost:
            forgotten = "not in context any more", len(traj.turns), "", ""
            cause, turn, wrote, right = first_mistake(traj, policy) or forgotten
            example = f"turn {turn}: {wrote}\n      right was: {right}"
            row = causes.setdefault(cause, dict(episodes=0, lost=0, turn=0, example=example))
            row["episodes"] += 1
            row["lost"] += lost
            row["turn"] += (turn - row["turn"]) / row["episodes"]
    return dict(sorted(causes.items(), key=lambda item: -item[1]["lost"]))


def memory(trajs, policy):
    """What the state holds, by turn: {turn: {going, found, held, right, state}}.

        going  share of the episodes that come so far
        found  answers that the agent has asked for and been shown so far
        held   share of them in its state (an agent that keeps older states need not repeat them)
        right  share of turns that are what the demonstrator would write
        state  tokens in the state
    """
    by_turn, episodes = {}, 0
    for traj in trajs:
        episodes += 1
        found = set()
        for t, turn in enumerate(traj.turns):
            kind, _, _, query = parse(turn.written)
            if kind == "query":
                held = found & set(re.findall(envs.ENTRY, ENC.decode(turn.state)))
                right = turn.written == expert(traj.env, policy, traj.turns[:t])
                cells = len(found), len(held), right, len(turn.state)
                by_turn.setdefault(t + 1, []).append(cells)
            found |= answers_shown(traj.env, query, ENC.decode(turn.info))
    rows = {}
    for t, cells in sorted(by_turn.items()):
        found, held, right, state = np.mean(cells, axis=0).tolist()
        rows[str(t)] = dict(going=len(cells) / episodes, found=found, right=right, state=state,
                            held=held / found if found else 0.0)
    return rows


def answers_shown(env, query, info):
    """The answers {(index, answer), ...} that an <info> shows to whoever asked `query`."""
    query = query.strip().removeprefix("page ")
    missing = max(0, 2 - query.count(" "))  # words of a fact that the query leaves open
    shown = re.findall(rf"{re.escape(query)}(?: {envs.WORD}){{{missing}}}", info)
    return {(index, path[-1].split()[-1]) for index, path in env.paths.items() if path[-1] in shown}


# ----------------------------------------------------------------------------------------------
# Several runs


def collect(paths):
    """Finished runs as one: {"seeds": {seed: {method: {objectives: measures}}}, "memory",
    "failures", "curves", "meta"}. A larger model is told by its size: `full-2x`.

    What the state of mem1 holds, and why it fails, at 16 objectives is measured here, and its table
    at 64, the farthest horizon, if the run has indices for it.
    """
    one = dict(seeds={}, memory={}, failures={}, curves={}, meta={})
    runs = [(Path(path), *load_run(path)) for path in paths]
    sizes = []
    for _, _, models in runs:
        weights = next(iter(models.values()))["weights"]
        sizes.append(sum(w.numel() for w in weights.values()))
    for (path, cfg, models), size in zip(runs, sizes):
        if not (path / "results.json").is_file():
            raise ValueError(f"{path} is not finished: python train.py --out {path} --resume")
        times = round(size / min(sizes))
        larger = f"-{times}x" if times > 1 else ""
        results = json.loads((path / "results.json").read_text())
        one["meta"][path.name] = {**results.pop("meta"), "config": vars(cfg)}
        seed = str(cfg.seed)
        mine = one["seeds"].setdefault(seed, {})
        for method, cells in results.items():
            if method + larger in mine:
                raise ValueError(f"{path}: a second run of seed {seed} with {method}{larger}")
            mine[method + larger] = cells
        curves = one["curves"].setdefault(seed, {})
        for line in (path / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["stage"] == "ppo":
                curves.setdefault(row["agent"] + larger, []).append(round(row["reward"], 4))
        if "mem1" in results and not larger:
            one["memory"][seed], one["failures"][seed] = {}, {}
            for method in "mem1", "mem1-demos":
                look_closer(one, cfg, models[method], seed, method)
    return one


def look_closer(one, cfg, saved, seed, method):
    """The part of collect() that plays episodes."""
    policy, model = POLICIES["mem1"], load_model(saved)
    n, farthest = min(16, envs.longest_horizon(cfg)), min(64, envs.longest_horizon(cfg))
    episodes = min(64, cfg.eval_episodes)
    one["seeds"][seed][method][str(farthest)] = measure(
        model, policy, cfg, farthest, episodes, Stream.TEST)
    one["memory"][seed][method] = memory(play(model, policy, cfg, n, episodes, Stream.TEST), policy)
    if method == "mem1":
        trajs = play(model, policy, cfg, n, 4 * episodes, Stream.TEST)
        one["failures"][seed] = failures(trajs, policy)


FORMATS = dict(em=".2f", f1=".2f", peak=".0f", dependency=".0f", right=".1%", time=".3f",
               kv_bytes=".0f")


def report(one):
    """All tables {title: markdown} of what collect() returns: means over the seeds ± deviation."""
    seeds = one["seeds"].values()
    order = sorted({method for cells in seeds for method in cells})
    horizons = sorted({int(n) for cells in seeds for rows in cells.values() for n in rows})
    tables = {"the README's table": readme_table(one)}
    for name, form in FORMATS.items():
        rows = [[f"`{m}`", *(cell(one, m, n, name, form) for n in horizons)] for m in order]
        tables[name] = markdown([name, *horizons], rows)
    for seed, agents in one["memory"].items():
        for method, rows in agents.items():
            cells = [[t, f"{r['found']:.1f}", f"{r['held']:.0%}"] for t, r in rows.items()]
            title = f"memory of {method}, seed {seed}"
            tables[title] = markdown(["turn", "answers found", "held in the state"], cells)
    for seed, causes in one["failures"].items():
        tables[f"first mistakes of mem1, seed {seed}"] = markdown(
            ["cause", "episodes", "objectives lost"],
            [[cause, row["episodes"], row["lost"]] for cause, row in causes.items()])
    return tables


README_AGENTS = {"mem1-demos": "mem1, imitation only", "mem1": "mem1, after PPO",
                 "full": "full context", "full-2x": "full context, twice the weights",
                 "amnesic": "no memory"}


def readme_table(one):
    """EM and peak at 1, 4, 16 and 32 objectives of the agents that the README compares."""
    head = ["", *(f"EM of {n}" for n in (1, 4, 16, 32)), *(f"peak at {n}" for n in (1, 4, 16, 32))]
    rows = []
    for method, text in README_AGENTS.items():
        em = [cell(one, method, n, "em", ".2f") for n in (1, 4, 16, 32)]
        peak = [cell(one, method, n, "peak", ".0f") for n in (1, 4, 16, 32)]
        rows.append([text, *em, *peak])
    return markdown(head, rows)


def cell(one, method, n, name, form):
    """Mean ± standard deviation over the seeds, as text."""
    rows = [seed.get(method, {}) for seed in one["seeds"].values()]
    values = [row[str(n)][name] for row in rows if str(n) in row]
    if not values:
        return ""
    text = f"{np.mean(values):{form}}"
    return f"{text} ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else text


def markdown(head, rows):
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def plot(one, path):
    """EM and peak tokens over the horizon: a line for the mean of the seeds, a band from the lowest
    to the highest."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(12, 4))
    titles = "questions answered", "peak tokens in context"
    for axis, name, title in zip(axes, ("em", "peak"), titles):
        for method, label in README_AGENTS.items():
            runs = [cells[method] for cells in one["seeds"].values() if method in cells]
            shared = set.intersection(*map(set, runs)) if runs else []
            x = sorted(map(int, shared))
            y = np.array([[run[str(n)][name] for n in x] for run in runs])  # (seeds, horizons)
            if runs:
                axis.plot(x, y.mean(0), marker="o", markersize=3, label=label)
                axis.fill_between(x, y.min(0), y.max(0), alpha=0.2)
        axis.set(xscale="log", xlabel="questions in the task", title=title)
        axis.set_xticks([1, 2, 4, 8, 16, 32, 64], "1 2 4 8 16 32 64".split())
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight")


# ----------------------------------------------------------------------------------------------
# The command line


def parse_arguments(argv):
    """The flags, and a function that refuses them in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="directory of a run, such as runs/cpu")
    parser.add_argument("--policies", nargs="+", help="such as mem1 full-demos; default: all")
    parser.add_argument("--objectives", type=int, nargs="+", help="horizons; default: the run's")
    parser.add_argument("--episodes", type=int, help="episodes a cell; default: the run's")
    parser.add_argument("--env", help="play in this world, trained for or not; default: the run's")
    parser.add_argument("--kinds", nargs="+", choices=["list", "chain", "count"])
    parser.add_argument("--show", type=int, metavar="K", help="print K episodes")
    parser.add_argument("--failures", action="store_true", help="why objectives were lost")
    parser.add_argument("--memory", action="store_true", help="what the state holds, by turn")
    parser.add_argument("--table", nargs="+", metavar="RUN", help="all tables of several runs")
    parser.add_argument("--plot", metavar="PNG", help="with --table: draw EM and peak, too")
    parser.add_argument("--json", action="store_true", help="print the table as JSON, nothing else")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])

    def refuse(message):
        parser.exit(2, f"eval.py: {message} (python eval.py --help)\n")

    parser.error = refuse
    args = parser.parse_args(argv)
    if min(args.episodes or 1, args.show or 1) < 1:
        refuse("--episodes, --show: expected at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch finds no GPU here")
    if not args.run and not args.table:
        refuse("no run given; expected the directory of a run of train.py, such as runs/cpu")
    return args, refuse


def main(argv=None):
    """Tables of several runs, or what the flags ask of one."""
    args, refuse = parse_arguments(argv)
    torch.set_num_threads(1)
    try:
        if args.table:
            results = tabulate(args)
        else:
            results = evaluate_run(args)
    except (ValueError, AssertionError, ImportError, AttributeError, OSError) as error:
        refuse(str(error))
    if args.json:
        print(json.dumps(results))


def tabulate(args):
    """Tables of several runs, or of the one file that --json made of them."""
    if args.table[0].endswith(".json"):
        one = json.loads(Path(args.table[0]).read_text())
    else:
        one = collect(args.table)
    if not args.json:
        for title, text in report(one).items():
            print(f"\n{title}\n\n{text}")
    if args.plot:
        plot(one, args.plot)
    return one


def evaluate_run(args):
    """What the flags ask of one run."""
    cfg, models = load_run(args.run)
    cfg.device = args.device
    if args.env not in (None, cfg.env):
        cfg.env, cfg.facts, cfg.names, cfg.kinds = args.env, "", len(envs.NAMES), ["list"]
    cfg.kinds = args.kinds or cfg.kinds
    longest = envs.longest_horizon(cfg)
    cfg.eval_objectives = args.objectives or [n for n in cfg.eval_objectives if n <= longest]
    for n in cfg.eval_objectives:
        assert 1 <= n <= longest, f"--objectives {n}: expected 1 to {longest}"
    chosen = methods(models)
    if args.policies:
        unknown = set(args.policies) - set(chosen)
        assert not unknown, f"--policies {' '.join(unknown)}: the run has {', '.join(chosen)}"
        chosen = {name: chosen[name] for name in args.policies}
    if not (args.show or args.failures or args.memory):
        episodes = args.episodes or cfg.eval_episodes
        results = table(models, cfg, chosen, episodes, silent if args.json else print)
        if not args.json:
            print(trend(results))
        return results

    n = args.objectives[0] if args.objectives else 4 if args.show else min(16, longest)
    episodes = args.show or args.episodes or 64
    env = envs.make_env(cfg, 1, [0])
    listed = env.paths and not getattr(env, "head", None)
    assert listed or not args.memory, "--memory: in this world a state holds no list of answers"
    for name, (model, policy) in chosen.items():
        trajs = play(load_model(models[model], cfg.device), policy, cfg, n, episodes, Stream.TEST)
        print(f"--- {name}, {n} objectives, {episodes} episodes")
        if args.failures:
            print_failures(failures(trajs, policy))
        elif args.memory:
            print_memory(memory(trajs, policy))
        else:
            for traj in trajs:
                show(traj, policy, sys.stdout.isatty())


def silent(line):
    """For table(): tell nobody."""


def print_failures(causes):
    """What failures() found."""
    for cause, row in causes.items():
        print(f"  {cause}: {row['episodes']} episodes, {row['lost']:g} objectives lost, at turn "
              f"{row['turn']:.0f} on average; for example\n    {row['example']}")


def print_memory(rows):
    """What memory() found."""
    print(f"{'turn':>5s} {'going':>6s} {'found':>6s} {'held':>6s} {'right':>6s} {'state':>6s}")
    for t, r in rows.items():
        print(f"{t:>5s} {r['going']:6.0%} {r['found']:6.1f} {r['held']:6.0%} {r['right']:6.1%} "
              f"{r['state']:6.1f}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
