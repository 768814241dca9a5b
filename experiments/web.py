"""web.py: the same questions, asked of one small web of prose, through an unreliable search engine.

    python train.py --env web --eval-objectives 1 2 4 8 --out runs/web
    python eval.py RUN --env web                    # an agent trained elsewhere, zero-shot

Unlike the private facts of envs.ComposedQA, these pages are the same in all episodes, so what
stands there could be learned by heart.
"""
import functools
import re

import numpy as np

from envs import NAMES, RELATIONS, ComposedQA, SearchIndex, words


def random_questions(facts, n, hops, rng):
    """n questions [(subject, relations, path), ...] about facts, on different subjects."""
    subjects = sorted(facts)
    questions = []
    for i in rng.permutation(len(subjects))[:n]:
        start = subject = subjects[i]
        relations, path = [], []
        for _ in range(rng.integers(hops[0], hops[1] + 1)):
            unused = [r for r in facts[subject] if r not in relations]
            relation = unused[rng.integers(len(unused))]
            answer = facts[subject][relation]
            relations.append(relation)
            path.append(f"{subject} {relation} {answer}")
            subject = answer
        questions.append((start, relations, path))
    return questions


@functools.cache
def corpus():
    """A small web that all episodes share, about 2300 pages of prose, near-duplicates among them:
    (facts {subject: {relation: object}}, search engine).

    Some facts stand on the page of their subject only; a search for them says to open it.
    """
    rng = np.random.default_rng(2506)
    phrases = ["they say that {}.", "{}, as of old.", "it is known: {}.", "{}, we hear.",
               "by all accounts {}."]
    known, pages = {}, []
    for subject in NAMES:
        known[subject] = {}
        for relation in rng.choice(RELATIONS, 6, replace=False):
            known[subject][str(relation)] = str(rng.choice(NAMES))
        for relation, answer in known[subject].items():
            if rng.random() < 0.1:
                hint = f"{subject}: of its {relation} see page {subject}."
                pages.append((f"{subject} {relation}", hint))
                continue
            fact = f"{subject} {relation} {answer}"
            for phrase in rng.choice(phrases, rng.integers(1, 4), replace=False):
                pages.append((subject, f"{subject}: {phrase.format(fact)}"))
    return known, SearchIndex([pages[i] for i in rng.permutation(len(pages))])


class World(ComposedQA):
    """The same questions, asked of corpus() through a search engine as unreliable as real ones.

    One search in ten finds nothing when it is first tried. `page jelo` opens the page of jelo.
    """
    turns_per_hop = 2

    def __init__(self, n_objectives=2, hops=(1, 2), seed=0):
        max_turns = 2 * hops[1] * (n_objectives + 1) + 2
        super().__init__(n_objectives, hops, seed, max_turns)
        self.luck = np.random.default_rng([*np.ravel(seed), 1])
        self.tried = set()

    def compose(self, indices, hops, rng):
        facts, engine = corpus()
        return random_questions(facts, len(indices), hops, rng), engine

    def expert(self, seen, fresh=False):
        """The demonstrator, who opens a page if a search says to."""
        state, kind, text = super().expert(seen, fresh)
        hint = re.search(r" see page (\S+)\.", seen.rpartition("<info>")[2])
        if kind == "query" and hint and text.startswith(f"{hint[1]} "):
            text = f"page {hint[1]}"
        return state, kind, text

    def answers_shown(self, query, info):
        return super().answers_shown(query.strip().removeprefix("page "), info)

    def search(self, query):
        query = " ".join(words(query)[:64])
        if query not in self.tried:
            self.tried.add(query)
            if self.luck.random() < 0.1:
                return []
        if query.startswith("page "):
            subject = query.split()[1]
            facts = corpus()[0].get(subject, {})
            return [", ".join(f"{subject} {r} {o}" for r, o in facts.items())] if facts else []
        return super().search(query)
