"""count.py: how many of the answers are a given name? A state of constant size is enough.

    python train.py --env count --demos oracle --out runs/count
"""
import re

from envs import (INDICES, LIST, NAMES, STOP, ComposedQA, SearchIndex, invent, oracle_notes,
                  read_answers, words)


class World(ComposedQA):
    """N questions, looked up as usual; the answer is one number: the one in the prompt, plus one
    for each answer that is the name in the prompt (about half of them are).

    >>> env = World(1, hops=(1, 1), seed=0)
    >>> env.prompt
    ' count #50 rava #68 : bure ally .'
    >>> env.step("query", "bure ally")
    ' left=2 bure ally rava, bure guard koki, bure spouse jira'
    >>> env.step("answer", "#51"), env.em
    ('', 1)
    """
    longest = len(INDICES) - 1  # the count is written as an index
    needs = {"demos": "oracle"}
    extra_words = ["count"]

    def __init__(self, n_objectives=2, hops=(1, 2), seed=0):
        super().__init__(n_objectives, hops, seed)
        self.prompt = f" count {self.start} {self.name}{self.prompt}"
        self.counts = [answer == self.name for _, answer in self.golds]
        self.take_piece(0, n_objectives)

    def compose(self, indices, hops, rng):
        self.start = str(rng.choice(INDICES[: -len(indices)]))
        self.name = str(rng.choice(NAMES))
        questions, facts = invent(indices, hops, rng)
        for _, _, path in questions:
            if rng.random() < 0.5:
                subject, relation, _ = path[-1].split()
                last = facts.index(path[-1])
                facts[last] = path[-1] = f"{subject} {relation} {self.name}"
        return questions, SearchIndex([(fact.split()[0], fact) for fact in facts])

    def take_piece(self, first, n):
        self.n_objectives = n
        self.golds = [(add(self.start, sum(self.counts[: first + n])), "")]
        self.paths = {}  # no state holds a list of answers

    def grade(self, text):
        return self.n_objectives if words(text) == [self.golds[0][0]] else 0

    def expert(self, seen, fresh=False):
        """The demonstrator, with the count where its list of answers was.

        The word `count` after what was found says that this answer counts:

            jelo pupil jero count ; #18 #65 : milu heir .
        """
        counted = r"; (#\d+) (?=#\d+ :)"
        count = ([self.start] + re.findall(counted, seen))[-1]
        state, kind, text = oracle_notes(self.prompt, re.sub(counted, "; ", seen), fresh=True)
        found, _, listed = state.partition(LIST)
        if kind == "answer":
            found, listed = state.removesuffix(STOP), text
        found = found.split()
        if self.name in read_answers(listed).values():
            count = add(count, 1)
            found.append("count")
        if kind == "answer":
            return " ".join([*found, STOP]), kind, count
        question = re.search(r"#\d+ :.*", listed)[0]
        return " ".join([*found, LIST, count, question]), kind, text


def add(index, n):
    """#17, 1 -> #18"""
    return f"#{int(index[1:]) + n}"
