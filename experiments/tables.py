"""tables.py: the tables and the plot of several runs.

    python experiments/tables.py runs/*-seed-?                  # all tables, as markdown
    python experiments/tables.py runs/*-seed-? --json > assets/results.json
    python experiments/tables.py assets/results.json --plot assets/scaling.png

Needs matplotlib for --plot.
"""
import argparse
import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from eval import load_run


def collect(paths):
    """Finished runs as one: {"seeds": {seed: {method: {objectives: measures}}}, "curves", "meta"}.
    A larger model is called `full-2x`, a run with --demos oracle `mem1-oracle`."""
    one = dict(seeds={}, curves={}, meta={})
    runs = [(Path(path), *load_run(path)) for path in paths]
    if len({cfg.env for _, cfg, _ in runs}) > 1:
        raise ValueError("runs of different worlds")
    sizes = []
    for _, _, models in runs:
        weights = next(iter(models.values()))["weights"]
        sizes.append(sum(w.numel() for w in weights.values()))
    for (path, cfg, models), size in zip(runs, sizes):
        if not (path / "results.json").is_file():
            raise ValueError(f"{path} is not finished: python train.py --out {path} --resume")
        times = round(size / min(sizes))
        variant = f"-{times}x" if times > 1 else ""
        variant += "-oracle" if cfg.demos == "oracle" else ""
        results = json.loads((path / "results.json").read_text())
        one["meta"][path.name] = {**results.pop("meta"), "config": vars(cfg)}
        seed = str(cfg.seed)
        mine = one["seeds"].setdefault(seed, {})
        for method, cells in results.items():
            if method + variant in mine:
                raise ValueError(f"{path}: a second run of seed {seed} with {method}{variant}")
            mine[method + variant] = cells
        curves = one["curves"].setdefault(seed, {})
        for line in (path / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["stage"] == "ppo":
                point = round(row["reward"], 4), round(row["memory"], 4)
                curves.setdefault(row["agent"] + variant, []).append(point)
    return one


FORMATS = dict(em=".2f", f1=".2f", peak=".0f", dependency=".0f", malformed=".1%", right=".1%",
               time=".3f")


def report(one):
    """All tables {title: markdown} of what collect() returns: means over the seeds ± deviation."""
    seeds = one["seeds"].values()
    order = sorted({method for cells in seeds for method in cells})
    horizons = sorted({int(n) for cells in seeds for rows in cells.values() for n in rows})
    tables = {"the README's table": readme_table(one)}
    for name, form in FORMATS.items():
        rows = [[f"`{m}`", *(cell(one, m, n, name, form) for n in horizons)] for m in order]
        tables[name] = markdown([name, *horizons], rows)
    return tables


README_AGENTS = {"mem1-demos": "mem1, random notes imitated",
                 "mem1-demos-sampled": "mem1, random notes imitated, sampled",
                 "mem1": "mem1, after PPO", "mem1-sampled": "mem1, after PPO, sampled",
                 "mem1-demos-oracle": "mem1, oracle notes imitated",
                 "full-demos": "full context, oracle notes imitated",
                 "full": "full context, after PPO",
                 "full-list": "full context that lists all",
                 "full-2x": "full context, twice the weights"}


def readme_table(one):
    """EM and peak at 2, 8, 16 and 32 objectives (if tested) of the agents in the README."""
    tested = {n for cells in one["seeds"].values() for rows in cells.values() for n in rows}
    horizons = [n for n in (2, 8, 16, 32) if str(n) in tested]
    head = ["", *(f"EM of {n}" for n in horizons), *(f"peak at {n}" for n in horizons)]
    rows = []
    trained = {method for cells in one["seeds"].values() for method in cells}
    for method, text in README_AGENTS.items():
        if method not in trained:
            continue
        em = [cell(one, method, n, "em", ".2f") for n in horizons]
        peak = [cell(one, method, n, "peak", ".0f").partition(" ±")[0] for n in horizons]
        rows.append([text, *em, *peak])
    return markdown(head, rows)


def cell(one, method, n, name, form):
    """Mean ± standard deviation over the seeds, as text."""
    rows = [seed.get(method, {}) for seed in one["seeds"].values()]
    values = [row[str(n)][name] for row in rows if name in row.get(str(n), {})]
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
    to the highest. And what PPO discovers: mem1's reward and memory over the iterations, all seeds.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(18, 4))
    for agents in one["curves"].values():
        for k, curve in enumerate(zip(*agents.get("mem1", []))):  # reward, memory
            axes[2].plot(curve, color=f"C{k}")
    axes[2].legend(["reward", "share of the answers found that the state holds"], fontsize=8)
    axes[2].set(xlabel="PPO iterations on two questions", title="memory, found by reward")
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="directories of finished runs, or one --json file")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--plot", metavar="PNG", help="draw EM, peak and what PPO discovers")
    args = parser.parse_args(argv)
    try:
        if args.runs[0].endswith(".json"):
            one = json.loads(Path(args.runs[0]).read_text())
            if "seeds" not in one:
                raise ValueError(f"{args.runs[0]} was not made by --json of this script")
        else:
            one = collect(args.runs)
        if args.plot:
            plot(one, args.plot)
    except (ValueError, OSError, ImportError) as error:  # ImportError: no matplotlib
        sys.exit(f"tables.py: {error}")
    if args.json:
        print(json.dumps(one))
        return
    for title, text in report(one).items():
        print(f"\n{title}\n\n{text}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
