"""rewards.py: PPO with rewards other than the share of right answers.

    python experiments/rewards.py --reward step --start runs/cpu --agents mem1 --out runs/step-0
    python experiments/rewards.py --reward step --out runs/step-0 --resume

It begins with the imitated agent of the --start run, takes all flags of train.py, and runs in one
process. Resume an interrupted run by this script too: train.py would pay the usual reward. The
run's reward.json records the reward.

An episode of N objectives earns, at the end of its last turn:
    em       the share of objectives answered exactly: what train.py pays
    all      1 if all are right, else 0
    format   as em, and 0.2 if the episode ends with an answer
    step     as em; and each turn earns on the way half of the share of the needed facts that its
             search brings to light

The `reward` in the log and in metrics.jsonl stays the share of right answers.
"""
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo
import train
from envs import words
from eval import Parser
from mem1 import ENC

REWARDS = "em", "all", "format", "step"


def turn_rewards(name, traj):
    """What each turn of a finished episode earned, in floats (J,)."""
    earned = new_facts(traj) if name == "step" else [0.0] * len(traj.turns)
    earned[-1] += float(traj.reward == 1) if name == "all" else traj.reward
    if name == "format" and traj.env.cause == "answered":
        earned[-1] += 0.2
    return earned


def new_facts(traj):
    """Half of the share of the needed facts that each turn is the first to be shown (J,)."""
    needed = {fact.lower() for path in traj.env.paths.values() for fact in path}
    earned, missing = [], set(needed)
    for turn in traj.turns:
        info = f" {' '.join(words(ENC.decode(turn.info)))} "
        shown = {fact for fact in missing if f" {fact} " in info}
        missing -= shown
        earned.append(0.5 * len(shown) / max(1, len(needed)))
    return earned


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--reward", choices=REWARDS, required=True)
    args, flags = parser.parse_known_args(argv)
    flags = ["--nproc", "1", *flags]
    cfg = train.parse_arguments(flags)
    if not cfg.start or cfg.nproc > 1:
        parser.error("expected --start RUN, to train its imitated agents, and one process")

    name = args.reward
    paid = Path(cfg.out) / "reward.json"
    if cfg.resume and (not paid.is_file() or json.loads(paid.read_text())["reward"] != name):
        sys.exit(f"rewards.py: {cfg.out} was not started with --reward {name}")
    try:
        paid.parent.mkdir(parents=True, exist_ok=True)
        paid.write_text(json.dumps({"reward": name}))
    except OSError as error:
        sys.exit(f"rewards.py: {paid} cannot be written: {error}")

    train.COMMAND = f"experiments/rewards.py --reward {name}"
    ppo.turn_rewards = functools.partial(turn_rewards, name)
    train.main(flags)


if __name__ == "__main__":
    main()
