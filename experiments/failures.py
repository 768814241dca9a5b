"""failures.py: why the agents of a run lose objectives, by the first mistake of each episode.

    python experiments/failures.py runs/cpu --objectives 16
    python experiments/failures.py runs/cpu --objectives 16 --agents mem1 full --episodes 256

A mistake is the first turn that is not what the demonstrator would have written with oracle notes,
given what the agent saw.
"""
import argparse
import re
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import envs
from envs import Stream
from eval import load_model, load_run, methods, play
from mem1 import ENC, expert, parse


def failures(trajs, policy):
    """Episodes that lost objectives, by the cause of their first mistake, with an example of each:
    {cause: {episodes, lost, turn, example}}, turn being the mean."""
    causes = {}
    for traj in trajs:
        lost = traj.env.n_objectives - traj.env.em
        if lost:
            forgotten = "not in context any more", len(traj.turns), "", ""
            cause, turn, wrote, right = first_mistake(traj, policy) or forgotten
            example = f"turn {turn}: {wrote}\n      right was: {right}"
            row = causes.setdefault(cause, dict(episodes=0, lost=0, turn=0, example=example))
            row["episodes"] += 1
            row["lost"] += lost
            row["turn"] += (turn - row["turn"]) / row["episodes"]
    return dict(sorted(causes.items(), key=lambda item: -item[1]["lost"]))


def first_mistake(traj, policy):
    """(cause, turn, written, right) of the first turn that is not what the demonstrator would have
    written, given what the agent saw; None if there is no such turn."""
    for t, turn in enumerate(traj.turns):
        right = expert(traj.env, policy, traj.turns[:t])
        cause = difference(turn.written, right)
        if cause:
            return cause, t + 1, ENC.decode(turn.written), ENC.decode(right)
    return None


def difference(written, right):
    """The cause of a mistake, in a few words; None if only the wording differs."""
    got, want = dissect(written), dissect(right)
    lost = want.entries.keys() - got.entries.keys()
    invented = got.entries.keys() - want.entries.keys()
    causes = [
        (got.kind == "malformed", "malformed, or cut off"),
        (got.kind != want.kind, "stopped early" if got.kind == "answer" else "did not stop"),
        (got.kind == "query" and want.index and not got.index, "lost the question"),
        # an open question written as an answer, or an answer as an open question:
        (want.index in got.entries or got.index in want.entries, "wrong hop"),
        (lost, "lost an entry"),
        (invented, "made up an entry"),
        (got.entries != want.entries, "changed an entry"),
        (got.index != want.index, "took up another question"),
        (got.question != want.question, "wrong hop"),
        (got.kind == "query" and got.text != want.text, "wrong hop"),
        (got.then != want.then, "wrong next question"),
        # a count, what a user said, the best product so far; or an entry twice:
        (got.words != want.words and got.kind == "answer", "wrong answer"),
        (got.words != want.words, "remembers something else"),
    ]
    return next((cause for is_so, cause in causes if is_so), None)


def dissect(ids):
    """What a turn says: its question at hand, its list."""
    kind, state, text = parse(ids)
    state = ENC.decode(state)
    stated = re.findall(envs.OPEN, state)
    index, subject, relations, then = stated[-1] if stated else ("", "", "", "")
    listed = text if kind == "answer" else state.partition(envs.LIST)[2]
    return SimpleNamespace(
        kind=kind, text=text, index=index, then=then,
        question=(subject, relations, state.count(":")),
        entries=dict(re.findall(envs.ENTRY, listed)), words=sorted(envs.words(listed)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="directory of a run, such as runs/cpu")
    parser.add_argument("--agents", nargs="+", default=["mem1"])
    parser.add_argument("--objectives", type=int, default=16)
    parser.add_argument("--episodes", type=int, default=64)
    args = parser.parse_args(argv)
    try:
        cfg, models = load_run(args.run)
        chosen = methods(models, snapshots=True)
        for name in args.agents:
            if name not in chosen:
                raise ValueError(f"--agents {name}: the run has {', '.join(chosen)}")
            source, policy, sampled = chosen[name]
            model = load_model(models[source])
            which = range(args.episodes)
            trajs = play(model, policy, cfg, args.objectives, which, Stream.TEST, sampled)
            print(f"--- {name}, {args.objectives} objectives, {args.episodes} episodes")
            for cause, row in failures(trajs, policy).items():
                print(f"  {cause}: {row['episodes']} episodes, {row['lost']:g} objectives lost, at "
                      f"turn {row['turn']:.0f} on average; for example\n    {row['example']}")
    except ValueError as error:
        sys.exit(f"failures.py: {error}")


if __name__ == "__main__":
    main()
