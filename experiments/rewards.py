"""rewards.py: PPO paid for something other than the share of right answers.

    python experiments/rewards.py --reward step --start runs/cpu --agents mem1 --out runs/step-0
    python experiments/rewards.py --reward step --out runs/step-0 --resume

It begins with the imitated agent of the --start run, takes all flags of train.py, and runs in one
process. Resume an interrupted run by this script too: train.py would pay the usual reward. What was
paid stands in the run's reward.json.

An episode of N objectives earns, at the end of its last turn:
    em       the share of objectives answered exactly: what train.py pays
    f1       their mean token F1
    partial  the share of which the given or the right answer contains the other
    all      1 if all are right, else 0
    format   as em, and 0.2 if the episode ends with an answer
    step     as em; and each turn earns on the way half of the share of the needed facts that its
             search brings to light
    judge    what a reward model thinks of it, 0 to 1. That is trained first, on preferences between
             two episodes of the imitated agent (Bradley-Terry, arXiv 2203.02155)

The `reward` in the log and in metrics.jsonl stays the share of right answers.
"""
import argparse
import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import ppo
import train
from envs import keyed_rng, words
from eval import load_model, load_run
from mem1 import ENC, POLICIES, Turn, keep_all, make_rows, parse, rollout

JUDGE = 5  # the judge's random stream; envs.Stream has 0 to 4
JUDGE_STEPS, JUDGE_LR = 60, 3e-4
JUDGE_BATCH = 64  # episodes per step, two of each task
REWARDS = "em", "f1", "partial", "all", "format", "step"


def turn_rewards(name, traj):
    """What each turn of a finished episode earned, in floats (J,)."""
    env, n = traj.env, traj.env.n_objectives
    em = env.em / n
    earned = new_facts(traj) if name == "step" else [0.0] * len(traj.turns)
    earned[-1] += {
        "em": em,
        "f1": env.f1 / n,
        "partial": partly_right(traj) / n,
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


def partly_right(traj):
    """Objectives of which the given or the right answer contains the other, in whole words."""
    env = traj.env
    kind, _, text = parse(traj.turns[-1].written)
    if kind != "answer" or not env.paths:  # the latter: the answer is not a list
        return env.em
    given = {}
    for entry in " ".join(words(text)).split("#")[1:]:
        index, _, answer = entry.strip().partition(" ")
        given.setdefault(f"#{index}", answer)  # of an index that occurs twice the first counts
    count = 0
    for index, gold in env.golds:
        got, want = given.get(index, ""), " ".join(words(gold))
        part = f" {got} " in f" {want} " or f" {want} " in f" {got} "
        if got == want or (got and want and part):
            count += 1
    return count


# ----------------------------------------------------------------------------------------------
# The judge


def judged(traj):
    """An episode as the judge reads it: all turns as one text. Only the last token is marked, since
    the value at the row that predicts it is the score."""
    ids = traj.prompt + keep_all(traj.env.history + traj.turns)
    return replace(traj, turns=[Turn(ids[:-1], ids[-1:])])


def scores(judge, trajs):
    """What the judge thinks of each episode (E,), with gradients."""
    (rows,) = make_rows([judged(traj) for traj in trajs], budget=10**9)
    rows = rows.to(judge.emb.weight.device)
    x = judge(rows.ids)[:, :-1][rows.loss_mask[:, 1:]]  # (E, C), the longest first
    return judge.value(x)[rows.index.argsort()]


def preferences(actor, agent, cfg, step):
    """Episodes, two of each task, and whether the first of the two is preferred (pairs,): with
    probability sigmoid(4 (its share of right answers - that of the second))."""
    environments, rngs, draws = [], [], []
    for i in range(JUDGE_BATCH // 2):
        for which in 2, 3:
            environments.append(train.training_task(cfg, agent, JUDGE, step, i))
            rngs.append(keyed_rng(cfg.seed, JUDGE, step, i, which))
        draws.append(keyed_rng(cfg.seed, JUDGE, step, i, 4).random())
    trajs = rollout(actor, environments, POLICIES[agent], rngs)
    share = torch.tensor([traj.reward for traj in trajs]).view(-1, 2)  # (pairs, 2)
    return trajs, torch.tensor(draws) < (4 * (share[:, 0] - share[:, 1])).sigmoid()


def margins(judge, trajs, first):
    """Score of the preferred episode of each pair, less that of the other (pairs,)."""
    pairs = scores(judge, trajs).view(-1, 2)  # (pairs, 2)
    sign = torch.where(first, 1.0, -1.0).to(pairs.device)  # (pairs,)
    return sign * (pairs[:, 0] - pairs[:, 1])


def train_judge(cfg):
    """A judge. It starts as the imitated agent whose episodes it is trained on."""
    (agent,) = cfg.agents
    saved = load_run(cfg.start)[1][f"{agent}-demos"]
    actor, judge = load_model(saved, cfg.device), load_model(saved, cfg.device)
    optimizer = torch.optim.AdamW(judge.parameters(), betas=(0.9, 0.95),
                                  weight_decay=cfg.weight_decay)
    schedule = SimpleNamespace(steps=JUDGE_STEPS, optimizer=optimizer)
    for step in range(JUDGE_STEPS):
        train.set_lr(schedule, JUDGE_LR, step, warmup=50)
        trajs, first = preferences(actor, agent, cfg, step)
        margin = margins(judge, trajs, first)  # (pairs,)
        loss = -F.logsigmoid(margin).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), cfg.grad_clip)
        optimizer.step()
        agrees = (0.5 + 0.5 * margin.sign()).mean()  # equal scores, as of equal episodes: half
        print(f"judge {step + 1:02d}/{JUDGE_STEPS} | loss {loss.item():.4f} | agrees {agrees:.0%}")
    return judge.requires_grad_(False)


def parse_arguments(argv):
    """(name of the reward, flags for train.py, its Config)."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", choices=[*REWARDS, "judge"], required=True)
    args, flags = parser.parse_known_args(argv)
    flags = ["--nproc", "1", *flags]
    cfg = train.parse_arguments(flags)
    if not cfg.start or cfg.nproc > 1:
        parser.error("expected --start RUN, whose imitated agents to begin with, and one process")
    if args.reward == "judge" and len(cfg.agents) > 1:
        parser.error("--reward judge: expected a single agent, e.g. --agents mem1")
    try:
        models = load_run(cfg.start)[1]
    except ValueError as error:
        parser.error(str(error))
    for agent in cfg.agents:
        if f"{agent}-demos" not in models:
            parser.error(f"--start {cfg.start}: it has not imitated {agent}")
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

    torch.set_num_threads(1)
    judge = train_judge(cfg) if name == "judge" else None

    @torch.no_grad()
    def judge_pays(traj):
        return [0.0] * (len(traj.turns) - 1) + [scores(judge, [traj]).sigmoid().item()]

    ppo.turn_rewards = judge_pays if judge else functools.partial(turn_rewards, name)
    train.main(flags)


if __name__ == "__main__":
    main()
