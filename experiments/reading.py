"""reading.py: how well the primer taught to read: the share of wrong words in exercises never seen.

    python experiments/reading.py runs/cpu
    python experiments/reading.py runs/cpu --longest 64 --models primer mem1 full

Every word is predicted after the right ones before it, and is wrong if another is likelier. The
exercise `note` is left out, since its answer is random.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from envs import SKILLS
from mem1 import ENC, exercise, make_rows
from train import load_model, load_run

UNSEEN = 10**6  # the step of the exercises: later than any that is trained


@torch.no_grad()
def mistakes(model, trajs):
    """{skill: (wrong, all)}: tokens to be predicted in these exercises."""
    counts = {}
    for traj in trajs:
        (rows,) = make_rows([traj])
        asked = rows.loss_mask[:, 1:]  # (1, T-1): the row at t predicts ids[t+1]
        logits = model.logits(model(rows.ids)[:, :-1][asked])  # (M, V)
        wrong = (logits.argmax(-1) != rows.ids[:, 1:][asked]).sum().item()
        skill = ENC.decode(traj.branches[0].ids[:1]).strip()
        before = counts.get(skill, (0, 0))
        counts[skill] = before[0] + wrong, before[1] + int(asked.sum())
    return counts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="directory of a run, such as runs/cpu")
    parser.add_argument("--models", nargs="+", default=["primer"])
    parser.add_argument("--longest", type=int, nargs="+", default=[16, 32, 64],
                        help="most items in a list")
    parser.add_argument("--exercises", type=int, default=1000)
    args = parser.parse_args(argv)
    skills = [skill for skill in SKILLS if skill != "note"]
    try:
        cfg, models = load_run(args.run)
        print(f"{'model':12s} {'items':>5s}  {'all':>6s}" + "".join(f"{s:>9s}" for s in skills))
        for name in args.models:
            assert name in models, f"--models {name}: the run has {', '.join(models)}"
            model = load_model(models[name])
            for longest in args.longest:
                trajs = [exercise(cfg, UNSEEN, i, longest) for i in range(args.exercises)]
                counts = mistakes(model, trajs)
                found = [counts.get(skill, (0, 0)) for skill in skills]
                total = [sum(column) for column in zip(*found)]
                shares = [wrong / max(of, 1) for wrong, of in [total, *found]]
                print(f"{name:12s} {longest:5d}  {shares[0]:6.2%}"
                      + "".join(f"{share:9.2%}" for share in shares[1:]))
    except (AssertionError, ValueError) as error:
        sys.exit(f"reading.py: {error}")


if __name__ == "__main__":
    main()
