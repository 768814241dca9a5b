"""aimless.py: is memory found by reward alone? The demonstrator takes notes without any purpose.

    python train.py --env aimless --forget 1 --objectives 1 2 --demos-steps 1300 --ppo-steps 1 \\
        --agents mem1 --out runs/aimless
    python train.py --start runs/aimless --env aimless --objectives 2 2 --ppo-steps 60 \\
        --ppo-batch 128 --ppo-lr 4e-4 --kl-coef 0.005 --eval-every 60 --agents mem1 --out runs/found

In the main recipe 40% of the demonstrations carry every answer to the end, so PPO only selects
between two demonstrated modes. Here none does (`--forget 1`). The demonstrator searches and answers
as before, but what it writes in its list says nothing about what is worth remembering:

    notes    at each turn with an observation, with probability 0.5, it notes the index of the
             question at hand with a random name in view; the list so far is carried on with
             probability 0.8, else dropped whole
    clutter  half of the episodes begin with a list of 1 to 13 random pairs, none of them asked for;
             and 60% of the prompts go on after their `.` with up to 14 sections that are not asked
             for. So neither the length of the list nor that of the prompt tells how many questions
             there are: trained on two questions, the agent does not learn to stop after two

Validation and test prompts have no clutter. The first command imitates on 1 and 2 questions; the
second is PPO on exactly two, with the last weights (it is validated once, at its end).
"""
import re
import zlib

import numpy as np

from envs import (INDICES, LIST, NAMES, RELATIONS, STOP, ComposedQA, Stream, asked, demonstrator,
                  entries, read_answers, words)

LONGEST = len(INDICES) // 2  # objectives: there are names for no more
NOTE, CARRY = 0.5, 0.8
NAME_SET = frozenset(NAMES)


class AimlessQA(ComposedQA):
    """ComposedQA with cluttered prompts in training, and a demonstrator whose notes are aimless.

    >>> env = AimlessQA(2, seed=[0, Stream.DEMOS, 0, 3, 0])
    >>> env.prompt.split(" .")[0] == ComposedQA(2, seed=[0, Stream.DEMOS, 0, 3, 0]).prompt[:-2]
    True
    """

    def __init__(self, n_objectives, hops=(1, 2), seed=0, max_turns=None):
        super().__init__(n_objectives, hops, seed, max_turns)
        self.task = self.prompt  # without clutter: what the demonstrator reads
        key = list(map(int, np.ravel(seed)))
        if len(key) == 5 and key[1] in (Stream.DEMOS, Stream.PPO):
            self.prompt += clutter(self.golds[-1][0], np.random.default_rng([*key, 7]))
        # turn_cap() is (2 + width) (8 + N): room for what 16 questions need, however few there are.
        self.width = max(1, -(-72 // (8 + n_objectives)) - 2)

    def expert(self, seen, amnesic=False, fresh=False):
        state, kind, text = demonstrator(self.task, seen, amnesic=False, fresh=fresh)
        if not amnesic:
            return state, kind, text
        return aimless(self.task, seen, state, kind, text)


def clutter(last, rng):
    """Sections after the task, with the indices after `last`: of the same form, not asked for."""
    if rng.random() >= 0.6:
        return ""
    after = INDICES[INDICES.index(last) + 1 :][: int(rng.integers(0, 15))]
    sections = []
    for index in after:
        relations = [str(r) for r in rng.permutation(RELATIONS)[: rng.integers(1, 3)]]
        sections += [index, *asked(str(rng.choice(NAMES)), relations)]
    return " " + " ".join([*sections, STOP]) if sections else ""


def aimless(task, seen, state, kind, text):
    """What the faithful demonstrator writes (state, kind, text), with its list replaced by aimless
    notes. What it draws follows from what it sees, so that it is a function of its context."""
    rng = np.random.default_rng(zlib.crc32((task + seen).encode()))
    asked_for = re.findall(r"#\d+", task)
    notes = read_answers(seen)
    if not seen and rng.random() < 0.5:
        others = [index for index in INDICES if index not in asked_for]
        first = int(rng.integers(len(others) - 15))
        some = others[first : first + int(rng.integers(1, 14))]
        notes = {index: str(rng.choice(NAMES)) for index in some}
    if seen and rng.random() >= CARRY:
        notes = {}
    at_hand = ([""] + re.findall(r"(#\d+) :", seen))[-1]
    info = seen.rpartition("<info>")[2] if "<info>" in seen else ""
    in_view = [word for word in words(info) if word in NAME_SET]
    if in_view and rng.random() < NOTE:
        notes[at_hand] = in_view[rng.integers(len(in_view))]
    if kind == "answer":
        fact = state.removesuffix(STOP).split()  # what the last search brought to light
        if len(fact) == 3:
            notes[at_hand] = fact[2]
        return state, kind, entries(notes)
    found, _, listed = state.partition(LIST)
    question = re.search(r"#\d+ :+ .*", listed)[0]
    parts = [found.strip(), LIST, entries(notes), question]
    return " ".join(filter(None, parts)), kind, text


def make_env(cfg, n_objectives, seed, max_turns=None):
    return AimlessQA(n_objectives, cfg.hops, seed, max_turns)


def extra_words(cfg):
    return []
