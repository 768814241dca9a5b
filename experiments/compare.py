"""compare.py: PPO of the mem1 agent in several finished runs, side by side.

    python experiments/compare.py runs/tree-* runs/stitched-*
    python experiments/compare.py runs/reward-* --json

Runs that were trained alike but for the seed are a group, named by the settings that set the groups
apart: mean (lowest to highest) over its runs.

    reward k/4     share of right answers while sampling, over each quarter of the iterations
    to 0.8         iterations until the mean reward of the last five is at least 0.8; inf: never
    kl, clip       means over the iterations, and
    gap            its maximum: what became of the policy (README.md, log keys)
    em@N, peak@N   of the final table
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np

# Settings that say where a run runs and how it is tested, not how its agent is trained.
ELSEWHERE = ("preset out resume start seed device nproc agents workers play_batch compile "
             "eval_every valid_episodes eval_objectives eval_episodes").split()


def read_settings(path):
    """{name: text} of the settings of a run that can set it apart."""
    config = json.loads((path / "config.json").read_text())["config"]
    config["facts"] = Path(config["facts"]).name  # wherever it lies
    config.setdefault("reward", "em")
    if (path / "reward.json").is_file():  # of rewards.py
        config.update(json.loads((path / "reward.json").read_text()))
    settings = {}
    for name, value in config.items():
        if name not in ELSEWHERE:
            settings[name] = " ".join(map(str, np.ravel(value))) or "-"
    return settings


def measure(path):
    """What is compared of one run: {name: number}."""
    rows = []
    for line in (path / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["stage"] == "ppo" and row["agent"] == "mem1":
            rows.append(row)
    cells = json.loads((path / "results.json").read_text()).get("mem1", {})
    if not rows or not cells:
        raise ValueError(f"{path} has no PPO of the mem1 agent; drop it")

    reward = [row["reward"] for row in rows]
    found = {}
    for i in range(4):
        quarter = reward[len(rows) * i // 4 : len(rows) * (i + 1) // 4]
        found[f"reward {i + 1}/4"] = float(np.mean(quarter)) if quarter else math.nan
    found["to 0.8"] = math.inf
    for end in range(5, len(rows) + 1):
        if np.mean(reward[end - 5 : end]) >= 0.8:
            found["to 0.8"] = float(end)
            break
    for name, pick in ("kl", np.mean), ("clip", np.mean), ("gap", np.max):
        found[name] = float(pick([row[name] for row in rows]))
    for n, cell in cells.items():
        found[f"em@{n}"], found[f"peak@{n}"] = cell["em"], cell["peak"]
    return found


def compare(paths):
    """{group: {name: [a number for each run]}}."""
    settings = []
    for path in paths:
        if not (path / "results.json").is_file():
            raise ValueError(f"{path} is not the directory of a finished run: no results.json")
        settings.append(read_settings(path))
    names = {name: None for run in settings for name in run}  # in order
    apart = [name for name in names if len({run.get(name, "-") for run in settings}) > 1]
    groups = {}
    for path, run in zip(paths, settings):
        group = groups.setdefault(", ".join(run.get(name, "-") for name in apart) or "all", {})
        for name, number in measure(path).items():
            group.setdefault(name, []).append(number)
    return groups


def as_text(groups):
    """A table: a column a group, a line a measure."""
    heads = []
    for name, group in groups.items():
        heads.append(f"{name}, {len(group['kl'])} runs")
    lines = [" " * 10 + "".join(f" | {head:26s}" for head in heads)]
    for name in {name: None for group in groups.values() for name in group}:
        line = f"{name:10s}"
        for group in groups.values():
            x = group.get(name, [math.nan])
            line += f" | {np.mean(x):7.3g} ({min(x):7.3g} to {max(x):7.3g})"
        lines.append(line)
    return "\n".join(lines)


def finite(groups):
    """The same for JSON, which has no inf and no nan: None."""
    found = {}
    for head, group in groups.items():
        found[head] = {}
        for name, numbers in group.items():
            found[head][name] = [x if math.isfinite(x) else None for x in numbers]
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    args = parser.parse_args(argv)
    try:
        groups = compare(args.runs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(str(error))
    print(json.dumps(finite(groups)) if args.json else as_text(groups))


if __name__ == "__main__":
    main()
