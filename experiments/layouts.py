"""layouts.py: what PPO would train in the paper's layouts of a MEM1 trajectory.

    python experiments/layouts.py             # random weights, on episodes of the demonstrator
    python experiments/layouts.py runs/cpu    # the trained mem1 agent of a run, on its own episodes
    python experiments/layouts.py --json      # the same as JSON, and nothing else

mem1.py has the three layouts: `tree` is exact, `stitched` is the paper's, `released` that of its
published code. All three are given the same episodes, from seeds that nothing is trained on.

    mean_nats  how far a trained token's log-probability is from the one that it was sampled with
    max_nats   the same of the worst token
    leak       how much the log-probabilities of the last turn change when all words of the turns
               that it did not see are exchanged for others
    tokens     in all branches, and in the prompt once; with the tree, the learner repeats the
               prompt in each row, which is not counted
    seconds    of CPU time for the forward and backward pass

The last two are means over the trajectories.

To see what a layout does to learning, train with it from an imitated agent (then compare.py):

    python train.py --start runs/cpu --agents mem1 --layout stitched --out runs/stitched-0
"""
import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import envs
import train
from envs import Stream, keyed_rng
from mem1 import (ENC, LAYOUTS, TAG_IDS, TASK, Turn, demonstrate, keep_last, make_rows, predict,
                  recorded, rollout)
from model import GPT, GPTConfig

TURNS = 1, 2, 3, 4, 8, 16  # whose means are printed


def measure(model, cfg, n, episodes, acts):
    """{layout: (measures, {turn: mean_nats})} at n objectives. acts: the model plays by itself.

    If it does not, the demonstrator plays, and "what acted" is the tree: random weights would not
    play an episode to its end.
    """
    environments = [envs.make_env(cfg, n, [0, Stream.TEST, n, i, 0]) for i in range(episodes)]
    if acts:
        rngs = [keyed_rng(0, Stream.TEST, n, i, 2) for i in range(episodes)]
        trajs = rollout(model, environments, keep_last, rngs)
        acted = torch.tensor(recorded(trajs, "logp"))  # (M,)
    else:
        trajs = [demonstrate(env, keep_last) for env in environments]
        acted, _ = learned(model, trajs)  # (M,)

    turn, last = [], []  # of each trained token: its turn, and whether that is the episode's last
    for traj in trajs:
        for t, this in enumerate(traj.turns):
            turn += [t + 1] * len(this.written)
            last += [t == len(traj.turns) - 1] * len(this.written)
    turn, last = torch.tensor(turn), torch.tensor(last)  # (M,), (M,)

    found = {}
    for name, layout in LAYOUTS.items():
        views = [layout(traj) for traj in trajs]
        logp, seconds = learned(model, views)
        off = (logp - acted).abs()  # (M,)
        changed, _ = learned(model, [layout(exchange_pruned(traj)) for traj in trajs])  # (M,)
        leak = (changed - logp).abs()[last]  # (tokens of the last turns,)
        tokens = 0
        for view in views:
            tokens += len(view.prompt) + sum(len(branch.ids) for branch in view.branches)
        measures = dict(mean_nats=off.mean().item(), max_nats=off.max().item(),
                        leak=leak.mean().item(), seconds=seconds / episodes,
                        tokens=tokens / episodes)
        by_turn = {t: off[turn == t].mean().item() for t in TURNS if (turn == t).any()}
        found[name] = measures, by_turn
    return found


def learned(model, trajs):
    """The learner's log-probabilities of all trained tokens (M,), and the seconds that it took."""
    logp = torch.zeros(sum(traj.n_trained for traj in trajs))  # (M,)
    started = time.process_time()
    for rows in make_rows(trajs):
        some, _, _ = predict(model, rows)  # (m,)
        some.sum().backward()
        logp[rows.index] = some.detach()
    model.zero_grad()
    return logp, time.process_time() - started


def exchange_pruned(traj):
    """The same trajectory with other words where the last turn does not look: in all turns but the
    last two, and in all branches but the last."""
    turns = []
    for turn in traj.turns[:-2]:
        turns.append(Turn(others(turn.state), others(turn.action), others(turn.info)))
    branches = [replace(branch, ids=others(branch.ids)) for branch in traj.branches[:-1]]
    return replace(traj, turns=turns + traj.turns[-2:], branches=branches + traj.branches[-1:])


def others(ids):
    """Another word for each word; tags and the number of tokens stay.

    >>> ENC.decode(others([*ENC.encode_ordinary(" #0 heir"), TAG_IDS[0]]))
    ' #1 rival<task>'
    """
    first, end = 256, TASK  # words are between the bytes and the tags
    return [i if i in TAG_IDS else first + (i + 1 - first) % (end - first) for i in ids]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="directory of a run with a trained mem1 agent")
    parser.add_argument("--objectives", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.run:
        try:
            cfg, models = train.load_run(args.run)
        except ValueError as error:
            parser.error(str(error))
        if "mem1" not in models:
            parser.error(f"{args.run} has no trained mem1 agent; expected a run that has")
        model = train.load_model(models["mem1"])
    else:
        cfg = train.Config()
        model = GPT(GPTConfig(ENC.n_vocab))
    longest = envs.longest_horizon(cfg)
    if args.episodes < 1 or not all(1 <= n <= longest for n in args.objectives):
        parser.error(f"expected 1 to {longest} --objectives, and 1 or more --episodes")

    if not args.json:
        print(f"{'layout':9s} {'N':>3s} {'mean nats':>10s} {'max nats':>9s} {'leak':>9s} "
              f"{'tokens':>7s} {'time':>7s}   mean nats at turn {', '.join(map(str, TURNS))}")
    results = {name: {} for name in LAYOUTS}
    for n in args.objectives:
        for name, (r, by_turn) in measure(model, cfg, n, args.episodes, bool(args.run)).items():
            results[name][str(n)] = r
            if not args.json:
                print(f"{name:9s} {n:3d} {r['mean_nats']:10.1e} {r['max_nats']:9.1e} "
                      f"{r['leak']:9.1e} {r['tokens']:7.0f} {r['seconds']:6.3f}s   "
                      f"{' '.join(f'{nats:.0e}' for nats in by_turn.values())}")
    if args.json:
        print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
