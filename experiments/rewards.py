"""rewards.py: PPO paid for something other than the share of right answers.

    python experiments/rewards.py --reward step --start runs/cpu --agents mem1 --out runs/step-0
    python experiments/rewards.py --reward step --out runs/step-0 --resume

It begins with the imitated agent of the --start run, takes all flags of train.py, and runs in one
process. Resume an interrupted run by this script too: train.py would pay the usual reward. The
run's reward.json says what was paid.

An episode of N objectives earns, at the end of its last turn:
    em       the share of objectives answered exactly: what train.py pays
    all      1 if all are right, else 0
    format   as em, and 0.2 if the episode ends with an answer
    step     as em; and each turn earns on the way half of the share of the needed facts that its
             search brings to light

The `reward` in the log and in metrics.jsonl stays the share of right answers.
"""
import argparse
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo
import train
from envs import words
from mem1 import ENC

REWARDS = "em", "all", "format", "step"


def turn_rewards(name, traj):
    """What each turn of a finished episode earned, in floats (J,)."""
    env, n = traj.env, traj.env.n_objectives
    em = env.em / n
    earned = new_facts(traj) if name == "step" else [0.0] * len(traj.turns)
    earned[-1] += {
        "em": em,
        "all": float(env.em == n),
        "format": em + (0.2 if env.cause == "answered" else 0.0),
        "step": em,
    }[name]
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


def parse_arguments(argv):
    """(name of the reward, flags for train.py, its Config)."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", choices=REWARDS, required=True)
    args, flags = parser.parse_known_args(argv)
    flags = ["--nproc", "1", *flags]
    cfg = train.parse_arguments(flags)
    if not cfg.start or cfg.nproc > 1:
        parser.error("expected --start RUN, whose imitated agents to begin with, and one process")
    return args.reward, flags, cfg


def main(argv=None):
    name, flags, cfg = parse_arguments(argv)
    paid = Path(cfg.out) / "reward.json"
    if cfg.resume and (not paid.is_file() or json.loads(paid.read_text())["reward"] != name):
        sys.exit(f"rewards.py: --reward {name}: {cfg.out} did not begin with that; see {paid}")
    try:
        paid.parent.mkdir(parents=True, exist_ok=True)
        paid.write_text(json.dumps({"reward": name}))
    except OSError as error:
        sys.exit(f"rewards.py: {paid} cannot be written: {error}")

    ppo.turn_rewards = functools.partial(turn_rewards, name)
    train.main(flags)


if __name__ == "__main__":
    main()
