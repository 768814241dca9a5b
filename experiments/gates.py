"""gates.py: what an agent forgets, and at which words.

    python experiments/gates.py runs/cpu --agents full

For each kind of word and each head, what its forget gate leaves of the weight of everything that
stands before it: 1.00 all, 0.00 nothing (the geometric mean over demonstrations of 4 questions).
"""
import argparse
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import envs
from envs import Stream
from mem1 import ENC, demonstrate
from train import load_model, load_run, methods


def kept(model, trajs):
    """{kind of word: what the gates leave, (n_layer, n_head)}, for kinds that occur ten times."""
    found = {}
    gates = []
    for block in model.blocks:
        block.gate.register_forward_hook(lambda module, x, y: gates.append(F.logsigmoid(y[0])))
    for traj in trajs:
        gates.clear()
        ids = traj.prompt + traj.branches[-1].ids
        with torch.no_grad():
            model(torch.tensor([ids]))
        for token, log_kept in zip(ids, torch.stack(gates, 1)):  # (T, n_layer, n_head)
            found.setdefault(kind(ENC.decode([token]).strip()), []).append(log_kept)
    return {k: torch.stack(v).mean(0).exp() for k, v in found.items() if len(v) >= 10}


def kind(word):
    """A word itself, or what it is: an index, a colon for each hop, a name, a relation, a digit."""
    kinds = {r"#\d+": "index", ":+": "colons", r"\d": "digit"}
    same = [name for pattern, name in kinds.items() if re.fullmatch(pattern, word)]
    if word in envs.A_NAME:
        return "name"
    return "relation" if word in envs.RELATIONS else (same or [word])[0]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="directory of a run, such as runs/cpu")
    parser.add_argument("--agents", nargs="+", default=["mem1"])
    args = parser.parse_args(argv)
    try:
        cfg, models = load_run(args.run)
        chosen = methods(models, snapshots=True)
        for name in args.agents:
            assert name in chosen, f"--agents {name}: the run has {', '.join(chosen)}"
            source, policy, _ = chosen[name]
            model = load_model(models[source])
            keys = [[0, Stream.VALID, 4, i, 0] for i in range(20)]
            trajs = [demonstrate(envs.make_env(cfg, 4, key), policy) for key in keys]
            heads = [f"{i}.{j}" for i in range(cfg.n_layer) for j in range(cfg.n_head)]
            print(f"--- {name}\n{'layer.head':10s}" + "".join(f"{head:>6s}" for head in heads))
            for word, left in sorted(kept(model, trajs).items(), key=lambda row: row[1].min()):
                print(f"{word:10s}" + "".join(f"{share:6.2f}" for share in left.flatten()))
    except (AssertionError, ValueError) as error:
        sys.exit(f"gates.py: {error}")


if __name__ == "__main__":
    main()
