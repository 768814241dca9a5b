"""bench_stages.py: seconds per step of each training stage, here and in another checkout.

    python experiments/bench_stages.py ../other               # some minutes
    python experiments/bench_stages.py ../other --start runs/cpu --flags --agents full
    python experiments/bench_stages.py ../other --quick       # smallest sizes: does it run?

The two take turns, each time with `train.py` and its default settings for a few steps, so that
other load affects both alike. A run counts by its median step, a pair by its ratio. PPO is slow
while an agent writes nonsense: with `--start`, the directory of a run that both checkouts can load,
it begins with the imitated agent of that run.
"""
import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[1]
STEPS = ("--device cpu --nproc 1 --agents mem1 --primer-steps 20 --demos-steps 10 --ppo-steps 6 "
         "--valid-episodes 1 --eval-episodes 1 --eval-objectives 1").split()


def seconds_per_step(checkout, flags):
    """{stage: seconds of the median step} of one short run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--out", f"{folder}/run", *flags]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        if done.returncode:
            *_, reason = ["no message", *done.stderr.splitlines()]
            raise ValueError(f"{checkout}: {reason}")
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    took = {}
    for before, row in itertools.pairwise(map(json.loads, lines)):
        if (row["stage"], row["agent"]) == (before["stage"], before["agent"]):
            took.setdefault(row["stage"], []).append(60 * (row["minutes"] - before["minutes"]))
    return {stage: float(np.median(seconds)) for stage, seconds in took.items()}


def compare(other, flags, pairs):
    """Print a line per stage: seconds here, seconds there, and how they compare."""
    both = [(seconds_per_step(HERE, flags), seconds_per_step(other, flags)) for _ in range(pairs)]
    for stage in both[0][0]:
        here, there = np.array([[a[stage], b[stage]] for a, b in both]).T  # each (pairs,)
        ratio = there / here
        print(f"{stage:6s} here {np.median(here):7.3f} s a step, there {np.median(there):7.3f} s: "
              f"{np.median(ratio):.2f} times ({ratio.min():.2f} to {ratio.max():.2f})")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="directory of the other checkout")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each")
    parser.add_argument("--start", type=Path, help="a run whose imitated agent PPO begins with")
    parser.add_argument("--quick", action="store_true", help="smallest sizes")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more, for train.py")
    args = parser.parse_args(argv)
    flags = [*STEPS, *args.flags]
    if args.start:
        flags += ["--start", str(args.start.resolve())]
    if args.quick:
        flags += ["--preset", "debug", "--primer-steps", "3", "--demos-steps", "3"]
    try:
        compare(args.other, flags, args.pairs)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
