"""tables.py: the tables and figures of several runs.

    python experiments/tables.py runs/L4*-seed-? --json > assets/results.json
    python experiments/tables.py assets/results.json         # all tables, as markdown
    python experiments/tables.py assets/results.json --plot assets/scaling.png
    python experiments/tables.py runs/L*-seed-? --exposure --json > assets/exposure.json
    python experiments/tables.py assets/exposure.json --exposure --plot assets/exposure.png

A cell is the mean over the seeds ± half the width of its 95% confidence interval (Student's t).
--plot needs matplotlib.
"""
import json
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from eval import Parser, load_run

MEASURES = dict(em=".2f", peak=".0f", dependency=".0f", malformed=".1%", right=".1%", time=".3f")
METHODS = {
    "mem1-demos": "mem1, random notes",
    "mem1-demos-sampled": "mem1, random notes, sampled",
    "mem1": "mem1, after PPO",
    "mem1-sampled": "mem1, after PPO, sampled",
    "mem1-demos-oracle": "mem1, oracle notes",
    "full-demos": "full context, oracle notes",
    "full": "full context, after PPO",
    "full-list-demos": "full context that lists all, oracle notes"}
EXPOSURE = {  # agents of exposure.json
    "mem1": "mem1-demos-oracle", "full": "full-demos", "full-list": "full-list-demos",
    "mem1-random": "mem1-demos", "mem1-random-ppo": "mem1", "mem1-ppo": "mem1-oracle",
    "full-ppo": "full", "full-list-ppo": "full-list"}
COMPARED = [
    ("mem1", "full-demos"),
    ("full-demos", "full"),  # what PPO costs full context
    ("mem1-demos-oracle", "mem1"),
    ("mem1-demos-oracle", "full-demos"),
    ("mem1-demos-oracle", "full-list-demos"),  # pruning
    ("full-list-demos", "full-demos")]  # consolidating
DRAWN = [method for method in METHODS if not method.endswith("-sampled")]
CURVES = "reward", "memory", "ev", "gap"  # what is kept of the log of PPO
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # two-sided, of n seeds; beyond, as of 6


def collect(paths):
    """Finished runs of one world as {"methods": {method: {seed: {objectives: measures}}}, "curves":
    {agent: {seed: [CURVES of each PPO iteration]}}, "meta": {run: ...}}."""
    runs = []
    for path in map(Path, paths):
        cfg, models = load_run(path)
        if not (path / "results.json").is_file():
            raise ValueError(f"{path} is not finished; resume it by the script that began it")
        weights = next(iter(models.values()))["weights"]
        runs.append((path, cfg, sum(w.numel() for w in weights.values())))
    if len({(cfg.env, cfg.around) for _, cfg, _ in runs}) > 1:
        raise ValueError("runs of different worlds, or with different --around")
    smallest = min(size for _, _, size in runs)
    one = dict(methods={}, curves={}, meta={})
    for path, cfg, size in runs:
        results = json.loads((path / "results.json").read_text())
        config = {name: value for name, value in vars(cfg).items() if name not in ("out", "start")}
        one["meta"][path.name] = {**results.pop("meta"), "config": config}
        larger, seed = round(size / smallest), str(cfg.seed)
        for method, cells in results.items():
            name = full_name(method, cfg, larger)
            mine = one["methods"].setdefault(name, {})
            if seed in mine:
                raise ValueError(f"{path}: a second run of seed {seed} with {name}")
            mine[seed] = cells
        for line in (path / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["stage"] == "ppo":
                point = [float(f"{row[name]:.3g}") for name in CURVES]
                name = full_name(row["agent"], cfg, larger)
                one["curves"].setdefault(name, {}).setdefault(seed, []).append(point)
    return one


def full_name(method, cfg, larger):
    """A method's name among those of other runs: `full-2x` of a model twice as large,
    `mem1-oracle` if it imitated oracle notes."""
    if larger > 1:
        method += f"-{larger}x"
    if cfg.demos == "oracle" and method.startswith("mem1"):
        method += "-oracle"
    return method


def exposures(paths):
    """Finished runs by L = --around: {L: {agent of EXPOSURE: {seed: {objectives: measures}}}}."""
    by_around = {}
    for path in paths:
        by_around.setdefault(str(load_run(path)[0].around), []).append(path)
    found = {}
    for around in sorted(by_around, key=int):
        methods = collect(by_around[around])["methods"]
        found[around] = {}
        for agent, method in EXPOSURE.items():
            for seed, cells in methods.get(method, {}).items():
                few = {n: {name: cell[name] for name in "em peak dependency time malformed".split()}
                       for n, cell in cells.items()}
                found[around].setdefault(agent, {})[seed] = few
    return found


def report(methods, names):
    """A table of {method: {seed: {objectives: measures}}} for each of MEASURES."""
    runs = [cells for seeds in methods.values() for cells in seeds.values()]
    horizons = sorted({int(n) for cells in runs for n in cells})
    tables = []
    for name in MEASURES:
        rows = [[f"`{m}`", *(mean(methods[m], n, name) for n in horizons)] for m in names]
        tables.append(markdown([name, *horizons], rows))
    return tables


def summary(methods, horizons):
    """EM of {label: {seed: {objectives: measures}}} at some horizons, and the rest at 16."""
    rows = []
    for label, seeds in methods.items():
        em = [mean(seeds, n, "em") for n in horizons]
        rest = [mean(seeds, 16, name).partition(" ±")[0]
                for name in ("peak", "dependency", "time", "malformed")]
        rows.append([label, len(seeds), *em, *rest])
    return markdown(["", "seeds", *(f"EM of {n}" for n in horizons), "peak at 16", "dependency",
                     "seconds", "malformed"], rows)


def readme_table(methods):
    """The table in the README."""
    return summary({label: methods[name] for name, label in METHODS.items() if name in methods},
                   horizons=(2, 8, 16, 32))


def exposure_table(found):
    """All agents at all L."""
    methods = {f"L = {around}, `{agent}`": seeds
               for around, agents in found.items() for agent, seeds in agents.items()}
    return summary(methods, horizons=(2, 4, 8, 16, 32, 64))


def by_seed(methods, names):
    """EM of each method and seed."""
    rows = []
    for method in names:
        for seed, cells in sorted(methods[method].items()):
            em = [mean({seed: cells}, n, "em") for n in (2, 8, 16, 32, 64)]
            rows.append([f"`{method}`", seed, *em])
    return markdown(["em", "seed", 2, 8, 16, 32, 64], rows)


def ppo_table(curves):
    """mem1's CURVES at some iterations of PPO, and the largest gap of all."""
    rows, shown = [], (1, 4, 8, 12, 16, 20, 30, 40, 50, 60)
    for seed, curve in sorted(curves.get("mem1", {}).items()):
        *columns, gap = zip(*curve)
        for name, values in zip(CURVES, columns):
            found = [f"{values[i - 1]:.2f}" for i in shown if i <= len(values)]
            rows.append([f"seed {seed}, {name}", *found])
        rows.append([f"seed {seed}, largest gap", f"{max(gap):.1e}"])
    return markdown(["iteration", *shown], rows)


def comparison(methods, a, b):
    """How a differs from b, paired by seed. No em / em if b has at most 1/20 right on a seed."""
    seeds = sorted(set(methods.get(a, {})) & set(methods.get(b, {})))
    rows = []
    tested = [{int(n) for n in methods[x][seed]} for x in (a, b) for seed in seeds]
    for n in sorted(set.intersection(*tested)) if seeds else []:
        pairs = [(methods[a][seed][str(n)], methods[b][seed][str(n)]) for seed in seeds]
        row = [n, interval([x["em"] - y["em"] for x, y in pairs], "+.2f")]
        for name in "em", "peak", "dependency":
            is_defined = name != "em" or all(y["em"] > n / 20 for _, y in pairs)
            ratios = [x[name] / y[name] for x, y in pairs] if is_defined else []
            row.append(interval(ratios, ".2f"))
        rows.append(row)
    head = ["em less em", "em / em", "peak / peak", "dependency / dependency"]
    return markdown([f"`{a}` and `{b}`", *head], rows)


def mean(seeds, n, name):
    """Mean of a measure at n objectives ± half of the 95% interval over {seed: cells}, as text."""
    values = [cells[str(n)][name] for cells in seeds.values() if str(n) in cells]
    return interval(values, MEASURES[name])


def interval(values, form):
    """Mean ± half of the 95% interval by Student's t, as text."""
    if not values:
        return ""
    text = f"{np.mean(values):{form}}"
    if len(values) == 1:
        return text
    half = T_95[min(len(values), 6)] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{text} ± {half:{form.lstrip('+')}}"


def markdown(head, rows):
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def plot(one, path):
    """EM and peak tokens over the horizon, and what PPO discovers: mem1's reward and memory over
    the iterations, all seeds."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(18, 4))
    for curve in one["curves"].get("mem1", {}).values():
        reward, memory, *_ = zip(*curve)
        axes[2].plot(reward, color="silver")
        axes[2].plot(memory, color="black")
    axes[2].legend(["reward", "share of the answers found that the state holds"], fontsize=8)
    axes[2].set(xlabel="PPO iterations on two questions", title="memory, found by reward")
    for method in DRAWN:
        for axis, name in zip(axes, ("em", "peak")):
            draw(axis, one["methods"].get(method, {}), name, method)
    axes[0].set_title("share of the questions answered")
    axes[1].set(title="peak tokens, without the prompt", yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="upper center",
                  bbox_to_anchor=(0.37, 0))
    figure.savefig(path, bbox_inches="tight")


def plot_exposure(found, path):
    """Share of the questions answered over the horizon, a panel for each L."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.5), sharey=True,
                                squeeze=False)
    for axis, (around, agents) in zip(axes[0], found.items()):
        for agent in "mem1", "full", "full-list", "mem1-random-ppo":
            draw(axis, agents.get(agent, {}), "em", EXPOSURE[agent])
        axis.axvline(int(around) + 2, color="grey", linestyle=":",
                     label="longest list in training tasks")
        axis.set_title(f"L = {around}")
    axes[0, 0].set_ylabel("share of the questions answered")
    labels = [axis.get_legend_handles_labels() for axis in axes[0]]
    figure.legend(*max(labels, key=lambda pair: len(pair[1])), ncols=3, loc="upper center",
                  bbox_to_anchor=(0.5, -0.03))
    figure.savefig(path, bbox_inches="tight")


def draw(axis, seeds, name, method):
    """A line for the mean of the seeds, a band from the lowest to the highest. EM as a share."""
    if not seeds:
        return
    x = sorted(set.intersection(*({int(n) for n in cells} for cells in seeds.values())))
    y = np.array([[cells[str(n)][name] for n in x] for cells in seeds.values()])  # (seeds, x)
    if name == "em":
        y = y / x
    color = f"C{DRAWN.index(method)}"
    axis.plot(x, y.mean(0), marker="o", markersize=3, label=METHODS[method], color=color)
    axis.fill_between(x, y.min(0), y.max(0), alpha=0.2, color=color)
    axis.set(xscale="log", xlabel="questions in the task")
    axis.set_xticks([1, 2, 4, 8, 16, 32, 64], "1 2 4 8 16 32 64".split())


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="directories of finished runs, or one --json file")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--exposure", action="store_true", help="group the runs by --around")
    parser.add_argument("--plot", metavar="PNG", help="draw the figure")
    args = parser.parse_args(argv)
    try:
        if args.runs[0].endswith(".json"):
            one = json.loads(Path(args.runs[0]).read_text())
            if ("methods" in one) == args.exposure or not one:
                raise ValueError(f"{args.runs[0]} was not made by these flags and --json")
        else:
            one = exposures(args.runs) if args.exposure else collect(args.runs)
        if args.plot:
            draw_figure = plot_exposure if args.exposure else plot
            draw_figure(one, args.plot)
    except (ValueError, OSError, ImportError) as error:  # ImportError: no matplotlib
        parser.error(str(error))
    if args.json:
        print(json.dumps(one))
        return
    if args.exposure:
        print(exposure_table(one))
        return
    methods = one["methods"]
    names = [name for name in METHODS if name in methods] + sorted(set(methods) - set(METHODS))
    tables = [readme_table(methods), *report(methods, names)]
    tables += [comparison(methods, a, b) for a, b in COMPARED if a in methods and b in methods]
    print("\n\n".join([*tables, by_seed(methods, names), ppo_table(one["curves"])]))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()
