"""layouts.py: what the paper's layout of a MEM1 trajectory costs, and that of its released code.

    python experiments/layouts.py             # random weights, on episodes of the demonstrator
    python experiments/layouts.py runs/cpu    # the trained mem1 agent of a run, on its own episodes
    python experiments/layouts.py --train stitched --start runs/cpu --agents mem1 --out runs/stitch
    python experiments/layouts.py --train stitched --out runs/stitch --resume

`exact` is ours: one row a turn (mem1.py). `stitched` is the paper's: one copy of every token in one
row, under a 2-D mask. `released` is what the mask of the published code would be, were it applied.
All three are given the same episodes, from seeds that nothing is trained on.

    mean_nats  how far a trained token's log-probability is from the one that it was sampled with
    max_nats   the same of the worst token

--train is PPO under a layout, from the imitated agent of a run, in one process. The learner
recomputes old log-probabilities, as in the published code, and values, so PPO's ratio begins at 1.
It takes all flags of train.py. The layout is not saved with the run: resume by the same --train.
"""
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

import envs
import mem1
import ppo
import train
from envs import Stream, keyed_rng
from eval import Parser, load_model, load_run
from mem1 import ENC, IS, TAG_IDS, expert_rollout, keep_last, make_rows, predict, rollout
from model import WIDTH, GPT, GPTConfig

LAYOUTS = "exact", "stitched", "released"
TURNS = 1, 2, 3, 4, 8, 16  # whose means are printed


def stitched(traj, released=False):
    """The paper's layout (sec. 3.3, app. A.7): each token once, and which tokens each one sees:
    (ids, loss_mask, attention mask (n, n) bool). `*` is trained:

    >>> print(picture(stitched(mem1.sketch(keep_last, turns=3))))
      T S Q I S Q I S Q
    T 1 . . . . . . . .
    S 1 1 . . . . . . .
    Q 1 1 1 . . . . . . *
    I 1 1 1 1 . . . . .
    S 1 1 1 1 1 . . . .
    Q 1 1 1 1 1 1 . . . *
    I 1 1 1 1 1 1 1 . .
    S 1 . . . 1 1 1 1 .
    Q 1 . . . 1 1 1 1 1 *

    From turn 3 on this is not the policy that acted. Turn 3 reads keys of turn 2 that were computed
    while turn 2 still saw turn 1, so from the second layer on they leak it (at a turn boundary the
    convolution and the gates do so in the first).

    released: the mask of the published code. It also hides the previous state, which the agent did
    see, and an <info> sees nothing but itself.

    >>> print(picture(stitched(mem1.sketch(keep_last, turns=3), released=True)))
      T S Q I S Q I S Q
    T 1 . . . . . . . .
    S 1 1 . . . . . . .
    Q 1 1 1 . . . . . . *
    I . . . 1 . . . . .
    S 1 . 1 1 1 . . . .
    Q 1 . 1 1 1 1 . . . *
    I . . . . . . 1 . .
    S 1 . . . . 1 1 1 .
    Q 1 . . . . 1 1 1 1 *
    """
    parts = [(-1, "prompt", traj.prompt, False)]  # turn, kind, ids, trained
    history = traj.env.history
    for t, turn in enumerate(history + traj.turns):
        n, is_own = len(turn.state), t >= len(history)
        parts += [(t, "state", [IS], False), (t, "state", turn.written[:n], is_own),
                  (t, "action", turn.written[n:], is_own)]
        if turn is not traj.turns[-1]:
            parts.append((t, "info", turn.info, False))
    turn_of, kind_of, ids, loss_mask = [], [], [], []  # of each token
    for t, kind, tokens, is_trained in parts:
        ids += tokens
        turn_of += [t] * len(tokens)
        kind_of += [kind] * len(tokens)
        loss_mask += [is_trained] * len(tokens)
    turn_of, kind_of = np.array(turn_of), np.array(kind_of)
    ago = turn_of[:, None] - turn_of  # turns between the reader and what it reads
    attn_mask = np.tri(len(ids), dtype=bool) & ((kind_of == "prompt") | (ago <= 1))
    if released:
        attn_mask &= (ago == 0) | (kind_of != "state")
        attn_mask &= (kind_of[:, None] != "info") | ((ago == 0) & (kind_of == "info"))
    return ids, loss_mask, attn_mask


def picture(layout):
    """A layout as text, one row per token."""
    ids, loss_mask, attn_mask = layout
    names = ["TSQAIE"[TAG_IDS.index(token)] for token in ids]
    lines = ["  " + " ".join(names)]
    for name, row, trained in zip(names, attn_mask, loss_mask):
        cells = ["1" if x else "." for x in row]
        lines.append(" ".join([name, *cells] + (["*"] if trained else [])))
    return "\n".join(lines)


# --- The learner under a layout


@dataclass
class MaskedRow(mem1.Rows):
    """One trajectory as one row, and its attention mask (1, 1, T, T)."""
    attn_mask: torch.Tensor


def layout_rows(name, trajs, budget=8192, which=None):
    """As mem1.make_rows(), under a layout: a trajectory a batch. Reading exercises have none."""
    if name == "exact" or (trajs and trajs[0].env is None):
        return make_rows(trajs, budget, which)
    batch, start = [], 0
    for i, traj in enumerate(trajs):
        ids, loss_mask, attn_mask = stitched(traj, released=name == "released")
        if which is None or i in which:
            place = torch.arange(start, start + sum(loss_mask))
            batch.append(MaskedRow(torch.tensor([ids]), torch.tensor([loss_mask]), place,
                                   torch.from_numpy(attn_mask)[None, None]))
        start += sum(loss_mask)
    return batch


class MaskAsCache:
    """Passed as a model.Cache: it caches nothing, and supplies the attention mask."""

    def __init__(self, attn_mask):
        self.attn_mask = attn_mask  # (1, 1, T, T)

    def extend(self, layer, h, clock):
        return F.pad(h, (0, 0, WIDTH - 1, 0)), clock  # (B, 3+T, 2C), (B, T, nh)

    def append(self, layer, k, v):
        return k, v, self.attn_mask


class Masked:
    """A model with an attention mask, for mem1.predict()."""

    def __init__(self, model, attn_mask):
        self.model, self.attn_mask = model, attn_mask
        self.module = getattr(model, "module", model)

    def __call__(self, ids):
        return self.model(ids, MaskAsCache(self.attn_mask))


def layout_predict(model, rows):
    """As mem1.predict(), for rows of any layout."""
    if isinstance(rows, MaskedRow):
        model = Masked(model, rows.attn_mask)
    return predict(model, rows)


# --- How far each layout is from the sampler


def measure(model, cfg, n, episodes, acts):
    """{layout: (measures, {turn: mean_nats})} at n objectives. acts: the model plays by itself.

    If it does not, the demonstrator plays, and the exact layout stands in for the sampler: random
    weights would not play an episode to its end.
    """
    world = envs.world(cfg.env)
    environments = [world(n, cfg.hops, [0, Stream.TEST, n, i, 0]) for i in range(episodes)]
    if acts:
        rngs = [keyed_rng(0, Stream.TEST, n, i, 2) for i in range(episodes)]
        trajs = rollout(model, environments, keep_last, rngs)
        sampled = [x for traj in trajs for turn in traj.turns for x in turn.logp]
        acted = torch.tensor(sampled)  # (M,)
    else:
        trajs = [expert_rollout(env, keep_last) for env in environments]
        acted = learner_logp(model, "exact", trajs)  # (M,)

    number = torch.tensor([t + 1 for traj in trajs for t, turn in enumerate(traj.turns)
                           for _ in turn.written])  # (M,), of the turn of each trained token

    found = {}
    for name in LAYOUTS:
        off = (learner_logp(model, name, trajs) - acted).abs()  # (M,)
        measures = dict(mean_nats=off.mean().item(), max_nats=off.max().item())
        by_turn = {t: off[number == t].mean().item() for t in TURNS if (number == t).any()}
        found[name] = measures, by_turn
    return found


@torch.no_grad()
def learner_logp(model, name, trajs):
    """The learner's log-probabilities of all trained tokens under a layout (M,)."""
    n = sum(traj.n_trained for traj in trajs)
    logp = torch.zeros(n, dtype=model.emb.weight.dtype)  # (M,)
    for rows in layout_rows(name, trajs):
        logp[rows.place] = layout_predict(model, rows)[0]
    return logp


# --- PPO under a layout


def train_under(name, flags):
    """train.py, with the learner of ppo.update() under a layout."""
    flags = ["--nproc", "1", *flags]
    cfg = train.parse_arguments(flags)
    if list(cfg.agents) != ["mem1"] or cfg.nproc > 1:
        sys.exit("layouts.py: --train: expected --agents mem1, and one process")
    train.COMMAND = f"experiments/layouts.py --train {name}"

    def rollout_and_rescore(model, *args):
        trajs = rollout(model, *args)
        largest = 0.0
        for traj in trajs:
            (rows,) = layout_rows(name, [traj])
            with torch.no_grad():
                logp, value, _ = layout_predict(model, rows.to(model.emb.weight.device))
            lengths = [len(turn.written) for turn in traj.turns]
            for turn, its_logp, its_value in zip(traj.turns, logp.split(lengths),
                                                 value.split(lengths)):
                sampled = torch.tensor(turn.logp, device=its_logp.device)
                largest = max(largest, (its_logp - sampled).abs().max().item())
                turn.logp, turn.value = its_logp.tolist(), its_value.tolist()
        print(f"{name}: up to {largest:.1f} nats from the sampler")
        return trajs

    if name != "exact":
        ppo.rollout, ppo.predict = rollout_and_rescore, layout_predict
        ppo.make_rows = functools.partial(layout_rows, name)
    train.main(flags)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", help="directory of a run with a trained mem1 agent")
    parser.add_argument("--objectives", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--train", choices=LAYOUTS, help="PPO; other flags are those of train.py")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--train"]:
        args = parser.parse_args(argv[:2])
        return train_under(args.train, argv[2:])
    args = parser.parse_args(argv)
    if args.train:
        parser.error("--train: expected as the first flag")

    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg, model = train.Config(), GPT(GPTConfig(ENC.n_vocab))
    if args.run:
        try:
            cfg, models = load_run(args.run)
        except ValueError as error:
            parser.error(str(error))
        if "mem1" not in models:
            parser.error(f"{args.run} has no trained mem1 agent; expected a run that has")
        model = load_model(models["mem1"])
    longest = envs.longest_horizon(cfg)
    if args.episodes < 1 or not all(1 <= n <= longest for n in args.objectives):
        parser.error(f"--objectives: expected 1 to {longest}; --episodes: 1 or more")

    results = {name: {} for name in LAYOUTS}
    if not args.json:
        print(f"{'layout':9s} {'N':>3s} {'mean nats':>10s} {'max nats':>9s}   "
              f"mean nats at turn {', '.join(map(str, TURNS))}")
    for n in args.objectives:
        for name, (r, by_turn) in measure(model, cfg, n, args.episodes, bool(args.run)).items():
            results[name][str(n)] = r
            if not args.json:
                print(f"{name:9s} {n:3d} {r['mean_nats']:10.1e} {r['max_nats']:9.1e} "
                      f"  {' '.join(f'{nats:.0e}' for nats in by_turn.values())}")
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
