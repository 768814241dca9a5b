"""envs.py: the world in which the agent works, as text in and text out. No torch, no tokens.

    >>> env = ComposedQA(n_objectives=2, hops=(1, 2), seed=3)
    >>> env.prompt
    ' #64 : jelo pupil #65 :: milu pupil neighbour .'
    >>> env.step("query", "jelo pupil")
    ' left=5 jelo heir doza, jelo rival koza, jelo pupil jero'
    >>> env.step("query", "milu pupil")
    ' left=4 milu pupil zupe, milu mentor gipu, milu ally date'
    >>> env.step("query", "zupe neighbour")
    ' left=3 zupe neighbour veba, zupe mentor jovo, zupe doctor beni'
    >>> env.step("answer", "#64 jero #65 nobody"), env.done, env.em, env.n_objectives
    ('', True, 1, 2)

A task is made by composing N independent questions (MEM1 sec. 3.4). A question is an index, a name
and a chain of relations: `#65 :: milu pupil neighbour` asks for the neighbour of the pupil of milu. The
facts are drawn anew for every episode, so nothing can be memorised in the weights: the agent has to
search for each hop, and has to carry each answer to the end, where all are asked for at once.

Differs from the paper's environment (sec. 4.1):
1) a private random knowledge base of `subject relation object` facts instead of Wikipedia, and
   BM25 over it instead of a dense retriever;
2) questions carry an index, and the answer lists `#index answer` pairs instead of `a; b; ...`;
3) the turn budget follows from the task (longest chain x N + 2, more where searches fail or users change their
   minds) instead of 6 or 20.
"""
import collections
import functools
import itertools
import json
import math
import re
import unicodedata
from pathlib import Path

import numpy as np

# ----------------------------------------------------------------------------------------------
# The words of this world. Each is one token for the agent (mem1.py), names are invented.

RELATIONS = ("heir rival mentor ally spouse pupil guard cousin deputy doctor tenant neighbour").split()
_SYLLABLES = [c + v for c in "bdfgjklmnprstvz" for v in "aeiou"]
ALL_NAMES = [a + b for a, b in itertools.product(_SYLLABLES, _SYLLABLES) if a != b]
ALL_NAMES = [str(name) for name in np.random.default_rng(2506).permutation(ALL_NAMES)]
NAMES = ALL_NAMES[:200]  # the others are no tokens: an agent has to spell them
INDICES = [f"#{i}" for i in range(80)]  # wider than the longest horizon to be tested
COLONS = [":" * i for i in range(1, 6)]  # see asked()
LIST = ";"  # begins the list that an agent keeps
STOP = "."  # ends the list of questions, where otherwise the next index would stand
SKILLS = "copy edit append recall fact section".split()  # the skills of reading, see primer()
WORDS = [*NAMES, *RELATIONS, *INDICES, *SKILLS, *COLONS, LIST, STOP, "left", "answer", "now", "nothing", "found"]

REDUCED = ["count", "compare"]  # kinds of tasks whose answers are reduced to one word
KINDS = ["list", "chain", *REDUCED]  # of tasks, see ComposedQA

WORD = r"[^\s!-/:-@\[-^`{-~]+"  # a name: of any script, without white space and ASCII punctuation (but for _)
ENTRY = rf"(#\d+) (?!user )({WORD})"  # in a state or an answer: index, answer (`user` begins what is said in a Dialogue)
OPEN = rf"(#\d+) :+ ({WORD})((?: (?!user ){WORD})*) (#\d+|\.)"  # in a state: index, subject and relations still open, next index


class World:
    """A task of N objectives, turn by turn: what all worlds share. Each adds the task, act(), mark() and an expert.

    prompt   the task as text
    golds    [(index, answer), ...], what would be right
    width    tokens that a state has at most for an objective, beside its index and a colon: as a rule those of a name
    paths    {index: facts that lead to the answer}, where there are such
    best     the most that `em` can be

    After the last step: `em`, `f1` and `partial` are sums over objectives (0..N), `cause` says what ended it, and
    `gains` what each turn earned by itself, if such things are paid for (REWARDS).
    """

    def __init__(self, n_objectives, max_turns):
        self.n_objectives, self.max_turns, self.width = n_objectives, max_turns, 1
        self.best, self.paths, self.gains = n_objectives, {}, []
        self.turn, self.done, self.cause, self.em, self.f1, self.partial = 0, False, None, 0, 0.0, 0

    def step(self, kind, text):
        """One turn: `kind` is "query" or "answer", `text` any string at all. Returns the observation.

        Every observation says how many turns are left (MEM1 sec. 4.1), and with one left that the
        answer is due. Any other kind is malformed output: it ends the episode with nothing earned.
        """
        assert not self.done, "step() after the end of the episode"
        self.turn += 1
        self.gains.append(0.0)
        left = self.max_turns - self.turn
        if kind == "query" and left > 0:
            return f" left={left}{' answer now' if left == 1 else ''} {self.act(text)}"
        self.done, self.cause = True, {"answer": "answered", "query": "out of turns"}.get(kind, "malformed")
        if kind == "answer":
            self.em, self.f1, self.partial = self.mark(text)
        return ""


class ComposedQA(World):
    """N multi-hop questions over a knowledge base, behind a search tool.

    n_objectives  N, the horizon
    hops          (fewest, most) relations in a question
    distractors   facts on the same subject that are not asked for
    top_k         facts that a search returns at most
    seed          a number or a list of numbers; the same seed gives the same episode
    max_turns     turn budget, answer included; None: longest chain x N + 2
    kinds         of tasks, one drawn for each episode:
                      list     independent questions, all answers are due at the end
                      chain    of half of them the subject is an earlier answer: `#65 : #64 pupil`
                      count    `count #17 jelo`: go on from #17, one further for each answer that is jelo
                      compare  the answers are round numbers: the index of the question with the largest, of equals the first
    facts         None: a world invented for this episode alone; else Facts, see read_facts()
    asked_for     None: questions drawn at random; else [(subject, relations), ...] to be asked of `facts`
    names         of which a world is invented: the first 200 are one token each, all others several

    A turn gains half of the share of the facts needed that it brings to light.
    """

    def __init__(self, n_objectives=2, hops=(1, 2), distractors=2, top_k=3, seed=0, max_turns=None, kinds=("list",), facts=None, asked_for=None, names=len(NAMES)):
        assert 1 <= n_objectives <= len(INDICES), f"n_objectives is {n_objectives}, expected 1 to {len(INDICES)}"
        assert facts or n_objectives * hops[1] <= names, f"{n_objectives} objectives of {hops[1]} hops need more than {names} names"
        assert 1 <= hops[0] <= hops[1] and (facts or hops[1] + distractors <= len(RELATIONS)), f"hops {hops}, distractors {distractors}"
        super().__init__(n_objectives, max_turns or hops[1] * n_objectives + 2)
        rng = np.random.default_rng(seed)
        self.top_k, self.width = top_k, 1 if names <= len(NAMES) else 1 + max(map(len, NAMES))
        first = int(rng.integers(len(INDICES) - n_objectives + 1))  # a random start: see every index in training
        indices = INDICES[first : first + n_objectives]
        kind = str(rng.choice(kinds)) if len(kinds) > 1 else kinds[0]
        if facts is None:
            head, questions, triples = invent(indices, hops, distractors, kind, rng, ALL_NAMES[:names])
            self._search = Search(about(triples))
        else:
            questions = [facts.follow(*question) for question in asked_for] if asked_for else facts.draw(n_objectives, hops, rng)
            self._search, head = facts.search, []
        self.facts = self._search.texts
        self.questions = [" ".join([index, *asked(start, relations)]) for index, (start, relations, _) in zip(indices, questions)]
        self.paths = {index: path for index, (*_, path) in zip(indices, questions)}  # the facts that lead to each answer
        self.golds = [(index, path[-1].split()[2]) for index, path in self.paths.items()]
        self.needed, self.shown = {fact for path in self.paths.values() for fact in path}, set()
        self.prompt = " " + " ".join([*head, *self.questions, STOP])
        self.tally = start_of(head)  # what is right, in a task whose answers are reduced to one word
        for gold in self.golds:
            self.tally = fold(head, self.tally, *gold)
        self.in_order = facts is None and not self.tally  # the answers alone say which question is at hand

    def act(self, text):
        """A search."""
        found, before = self.search(text), len(self.shown)
        pages = " " + " ".join(words(" ".join(found))) + " "
        self.shown |= {fact for fact in self.needed if f" {fact.lower()} " in pages}
        self.gains[-1] = 0.5 * (len(self.shown) - before) / len(self.needed)
        return ", ".join(found) or "nothing found"

    def mark(self, text):
        """(em, f1, partial) of an answer."""
        if self.tally:  # one word for all objectives
            return 3 * (self.n_objectives * (words(text) == self.tally.split()[:1]),)
        return score(text, self.golds)

    def search(self, query):
        return self._search(query, self.top_k)

    def expert(self, seen, amnesic=False, style="whole"):
        """What the demonstrator would write: it sees what the agent sees, no more."""
        return demonstrator(self.prompt, seen, amnesic, "whole" if style == "apart" and not self.in_order else style)


def invent(indices, hops, distractors, kind, rng, pool=NAMES):
    """A world of its own: head of the task [word, ...], questions [(subject, relations, the facts that lead to the answer), ...],
    all facts [(subject, relation, object), ...]. Names are from `pool`."""
    n, names = len(indices), iter(map(str, rng.permutation(pool)))  # a name is the subject of one chain only
    head, earlier, draw = [], {}, lambda: str(rng.choice(pool))
    if kind == "chain":
        for i in range(1, n):
            free = sorted({*range(i)} - {*earlier.values()})
            if rng.random() < 0.5:
                earlier[i] = int(rng.choice(free))  # the question whose answer is its subject; an answer is taken up once at most
    elif kind in REDUCED:
        head, draw = reduction(kind, n, rng, pool)
    questions, triples = [], []
    for i in range(n):
        relations = [str(r) for r in rng.permutation(RELATIONS)]
        chain, others = relations[: rng.integers(hops[0], hops[1] + 1)], relations[hops[1] :]
        subject = questions[earlier[i]][2][-1].split()[2] if i in earlier else next(names)
        start, path = indices[earlier[i]] if i in earlier else subject, []
        for j, relation in enumerate(chain):
            answer = draw() if j == len(chain) - 1 and i not in earlier.values() else next(names)
            triples.append((subject, relation, answer))
            triples += [(subject, str(r), str(rng.choice(pool))) for r in rng.choice(others, distractors, replace=False)]
            path.append(f"{subject} {relation} {answer}")
            subject = answer
        questions.append((start, chain, path))
    return head, questions, [triples[i] for i in rng.permutation(len(triples))]


def reduction(kind, n, rng, pool=NAMES):
    """A task whose n answers are reduced to one word: its head [word, ...], and what draws an answer."""
    if kind == "compare":
        return [kind], lambda: str(rng.choice(INDICES[::10]))  # round: eight numbers are met often enough to learn their order
    head = [kind, str(rng.choice(INDICES[: len(INDICES) - n])), str(rng.choice(pool))]
    return head, lambda: head[2] if rng.random() < 0.5 else str(rng.choice(pool))


def start_of(head):
    """What is known before the first answer, in a task whose answers are reduced to one word; "" in any other."""
    return head[1] if head[:1] == ["count"] else ""


def fold(head, tally, index, answer):
    """One answer more: what is to be kept of it and all before, a word or two, however many they are. "" if that is not enough.

    >>> fold(["count", "#17", "jelo"], "#18", "#65", "jelo"), fold(["compare"], "#64 #20", "#65", "#31"), fold([], "", "#65", "jelo")
    ('#19', '#65 #31', '')
    """
    if head[:1] == ["count"]:
        return f"#{int(tally.split()[0][1:]) + (answer == head[2])}"  # split, since an agent may have written several
    if head[:1] == ["compare"] and answer.startswith("#"):
        return f"{index} {answer}" if not tally or int(answer[1:]) > int(tally.split()[-1][1:]) else tally
    return tally


class Search:
    """BM25 (k1 1.2, b 0, since pages are of about equal length) over pages [(title, text), ...].

    What stands in the title counts again: the page *about* a name comes before the pages that mention it.
    """

    def __init__(self, pages):
        self.texts = [text for _, text in pages]
        pages = [words(f"{title} {text}") for title, text in pages]
        df = {}
        for word in itertools.chain.from_iterable(map(set, pages)):
            df[word] = df.get(word, 0) + 1
        self.postings = {}  # word -> {page: weight}
        for i, page in enumerate(pages):
            for word in set(page):
                idf, tf = math.log(1 + (len(pages) - df[word] + 0.5) / (df[word] + 0.5)), page.count(word)
                self.postings.setdefault(word, {})[i] = idf * tf * 2.2 / (tf + 1.2)

    def __call__(self, query, top_k):
        """The texts that match `query` best, in the (random) order of the pages.

        Not in the order of their rank: the agent has to read what it got, not to take the first.
        """
        scores = {}
        for word in words(query)[:64]:  # of an over-long query the beginning counts
            for page, weight in self.postings.get(word, {}).items():
                scores[page] = scores.get(page, 0.0) + weight
        # Of pages of equal score the exact fact comes first, or facts that share its words could crowd it out.
        exact = lambda page: self.texts[page].lower().startswith(f"{query.strip().lower()} ")
        best = sorted(scores, key=lambda page: (-scores[page], not exact(page), page))[:top_k]
        return [self.texts[page] for page in sorted(best)]


def about(triples):
    """Facts [(subject, relation, object), ...] as pages: each is one, with its subject as title."""
    return [(triple[0], " ".join(triple)) for triple in triples]


class Facts:
    """A knowledge base from a file, shared by all episodes: its search tool, and questions about it."""

    def __init__(self, triples, pages=None):
        self.search, self.words = Search(pages or about(triples)), sorted({word for triple in triples for word in triple} - {*WORDS})
        self.known = {}  # subject -> {relation: object}, without those that have several
        several = {pair for pair, n in collections.Counter((s, r) for s, r, _ in triples).items() if n > 1}
        for s, r, o in triples:
            if (s, r) not in several:
                self.known.setdefault(s, {})[r] = o
        self.subjects = sorted(self.known)

    def draw(self, n, hops, rng):
        """n questions on different subjects, as far as there are so many: [(subject, relations, the facts that lead to the answer), ...].
        Of as many hops as the facts allow, if that is less than what was drawn."""
        any_of = lambda pool: pool[rng.integers(len(pool))]
        subjects = itertools.chain((self.subjects[i] for i in rng.permutation(len(self.subjects))), iter(lambda: any_of(self.subjects), None))
        questions = []
        while len(questions) < n:
            start = subject = next(subjects)
            relations = []
            for _ in range(rng.integers(hops[0], hops[1] + 1)):
                onward = [r for r in self.known.get(subject, {}) if r not in relations]
                if onward:
                    relations.append(any_of(onward))
                    subject = self.known[subject][relations[-1]]
            questions.append(self.follow(start, relations))
        return questions

    def follow(self, subject, relations):
        """The question with the facts that lead to its answer. ValueError if there is no fact, or several."""
        start, path = subject, []
        for relation in relations:
            if relation not in self.known.get(subject, {}):
                raise ValueError(f"there is no one fact `{subject} {relation}`; known of it: {', '.join(self.known.get(subject, {})) or 'nothing'}")
            path.append(f"{subject} {relation} {self.known[subject][relation]}")
            subject = self.known[subject][relation]
        return start, relations, path

    def parse(self, text):
        """`new zealand capital river` -> ("New_Zealand", ["capital", "river"]): known names, the longest that fit, in any case."""
        known = {word.casefold(): word for subject, facts in self.known.items() for word in (subject, *facts)}
        rest, found = name_of(text).casefold().split("_"), []
        while rest:
            n = next((n for n in range(len(rest), 0, -1) if "_".join(rest[:n]) in known), None)
            if n is None:
                raise ValueError(f"`{' '.join(rest)}`: no name or relation of the facts begins so")
            found.append(known["_".join(rest[:n])])
            rest = rest[n:]
        if len(found) < 2:
            raise ValueError(f"`{text.strip()}`: expected a name and one relation or more")
        return found[0], found[1:]


def name_of(text):
    """A name as this world writes it, one word: white space and ASCII punctuation become `_`, any script stays.

    >>> name_of(" São Tomé & Príncipe "), name_of("东京"), name_of("?")
    ('São_Tomé_Príncipe', '东京', '')
    """
    name = "_".join(re.findall(WORD, unicodedata.normalize("NFC", str(text)).replace("_", " ")))
    return "User" if name == "user" else name  # `user` begins what is said in a Dialogue; search and scores know no case


@functools.cache
def read_facts(path, skip_bad=False):
    """Facts of a file: a line a fact, `subject TAB relation TAB object`, or in a .jsonl file {"subject": ..., "relation": ..., "object": ...}.

    Empty lines and lines that begin with # are passed over. A name is spelled as where it stands first. A fact that stands
    there twice counts once. What has several objects can be found, but is not asked for. A bad line is a ValueError with its
    number, or skipped if skip_bad. Returns (Facts, [what to tell the user, ...]).
    """
    triples, spelled_as, told, bad = {}, {}, [], []
    text = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").decode(errors="replace")
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            parts = [json.loads(line)[key] for key in ("subject", "relation", "object")] if str(path).endswith(".jsonl") else line.split("\t")
        except (ValueError, KeyError, TypeError, RecursionError):
            parts = []
        names = [name_of(part) for part in parts if type(part) in (str, int)]
        if len(names) != 3 or not all(names) or re.search("[\ud800-\udfff\ufffd]", "".join(names)):
            bad.append(f"line {number} is {line[:60]!r}, expected subject, relation and object, in UTF-8")
            continue
        names = [spelled_as.setdefault(name.casefold(), name) for name in names]  # search and scores know no case
        triples.setdefault(tuple(names), names)
    if bad and not skip_bad:
        raise ValueError(f"{path}: {bad[0]}{f' (and {len(bad) - 1} more)' if len(bad) > 1 else ''}; mend it, or give --skip-bad-facts")
    facts = Facts(list(triples.values()))
    if not facts.known:
        raise ValueError(f"{path}: no fact to ask for")
    told += [f"skipped: {reason}" for reason in bad]
    several = len({(s, r) for s, r, _ in triples.values()}) - sum(map(len, facts.known.values()))
    told.append(f"{len(triples)} facts on {len(facts.subjects)} subjects; {several} subjects and relations with several objects: never asked for")
    return facts, told


def make(world, n_objectives, seed, max_turns=None):
    """The environment of an episode in the `world` of a configuration: all that a world is to the rest of the project."""
    if world.env == "shop":
        return Shop(n_objectives, seed, max_turns)
    settings = n_objectives, tuple(world.hops), world.distractors, world.top_k, seed, max_turns
    if world.env != "qa":
        return {"web": WebQA, "dialogue": Dialogue}[world.env](*settings)
    return ComposedQA(*settings, world.kinds, read_facts(world.facts, world.skip_bad_facts)[0] if world.facts else None, names=world.names)


def words_of(world):
    """The words that this world has besides WORDS: of its kinds of tasks, of its users and shops, of the file that it asks about."""
    more = dict(dialogue=["user", "-"], shop=[*SHOP_WORDS, *TYPES, *TRAITS, *COLORS]).get(world.env, [])
    facts = read_facts(world.facts, world.skip_bad_facts)[0].words if world.facts else []
    return [*sorted({*REDUCED} & {*world.kinds}), *more, *facts]


def spelled(world):
    """The names that are no tokens."""
    return ALL_NAMES[len(NAMES) : world.names]


@functools.cache
def corpus():
    """A small web of which all episodes ask, as Facts: thousands of pages of prose, near-duplicates among them.

    Some facts stand on the page of their subject only; what is found of them says to open it.
    """
    rng, triples, pages = np.random.default_rng(2506), [], []
    say = ["they say that {}.", "{}, as of old.", "it is known: {}.", "{}, we hear.", "by all accounts {}."]
    for subject in NAMES:
        mine = [(subject, str(r), str(rng.choice(NAMES))) for r in rng.choice(RELATIONS, 6, replace=False)]
        for triple in mine:
            if rng.random() < 0.1:
                pages.append((f"{subject} {triple[1]}", f"{subject}: of its {triple[1]} see page {subject}."))
            else:
                some = rng.choice(say, rng.integers(1, 4), replace=False)
                pages += [(subject, f"{subject}: {form.format(' '.join(triple))}") for form in some]
        triples += mine
    return Facts(triples, [pages[i] for i in rng.permutation(len(pages))])


class WebQA(ComposedQA):
    """The same questions, asked of corpus() through a search engine that is as unreliable as real ones.

    One search in ten finds nothing when it is first tried. `page jelo` opens the page of jelo.
    """

    def __init__(self, n_objectives=2, hops=(1, 2), distractors=2, top_k=3, seed=0, max_turns=None):
        super().__init__(n_objectives, hops, distractors, top_k, seed, max_turns or 2 * hops[1] * (n_objectives + 1) + 2, facts=corpus())
        self.luck, self.tried = np.random.default_rng([*np.ravel(seed), 1]), set()

    def search(self, query):
        if (query := " ".join(words(query)[:64])) not in self.tried:
            self.tried.add(query)
            if self.luck.random() < 0.1:
                return []
        if query.startswith("page "):
            known = corpus().known.get(query.split()[1], {})
            return [", ".join(f"{query.split()[1]} {r} {o}" for r, o in known.items())] if known else []
        return super().search(query)


class Dialogue(ComposedQA):
    """The user changes his mind: of N questions some come up on the way, among them ones about an earlier answer, some are
    corrected and some withdrawn (right is then not to answer them). He says so behind what a search found.

    >>> env = Dialogue(4, seed=3)
    >>> env.prompt
    ' #62 :: jelo doctor tenant #63 :: fati rival cousin #64 : #62 pupil #65 : seji guard .'
    >>> env.messages
    {2: ' user #63 -', 1: ' user #65 : seji ally'}

    The state keeps in mind what was said, in the same words, until it is dealt with.
    """

    def __init__(self, n_objectives=2, hops=(1, 2), distractors=2, top_k=3, seed=0, max_turns=None):
        super().__init__(n_objectives, hops, distractors, top_k, seed, max_turns or (hops[1] + 1) * n_objectives + 2, ["chain"])
        self.in_order = False
        self.width = 2 + hops[1]  # `user`, name and relations: what is still to be asked is kept in mind as it was said
        rng = np.random.default_rng([*np.ravel(seed), 1])
        _, questions = read_task(self.prompt)
        taken_up, at_first, messages = {subject for _, subject, *_ in questions}, [], []
        sure = 0  # questions that stay as they are: so many turns there are in any case
        for i, (index, subject, relations, _) in enumerate(questions):
            others = [fact.split()[1] for fact in self.facts if fact.split()[0] == subject and fact.split()[1] != relations[0]]
            fates = ["stays"] if i == 0 or index in taken_up else ["stays", "late"] if subject.startswith("#") else ["stays", "late", "corrected", "withdrawn"]
            fate = str(rng.choice(fates))
            if fate == "withdrawn":
                messages.append(said(index, "", []))
                self.golds[i] = index, ""
                del self.paths[index]
            elif fate != "stays":
                messages.append(said(index, subject, relations))
            if fate == "corrected" and others:  # at first it is about something else
                relations = [str(rng.choice(others))]
            if fate != "late":
                at_first.append(" ".join([index, *asked(subject, relations)]))
            sure += fate == "stays"
        self.needed = {fact for path in self.paths.values() for fact in path}
        self.prompt = " " + " ".join([*at_first, STOP])
        self.messages = {}  # turn -> what the user says then: while there is something left to ask for in any case
        for message in messages:
            turn = int(rng.integers(1, sure + 1))
            self.messages[turn] = f"{self.messages.get(turn, '')} {message}"

    def act(self, text):
        return super().act(text) + self.messages.get(self.turn, "")


SHOP_WORDS = "want under search click next end chosen buy in nothing happens".split()
TYPES = "jacket shirt lamp chair bag clock rug mug".split()
TRAITS = "cotton warm light round small soft matt thin plain strong old new".split()
COLORS = "red blue green black white grey".split()
PAGE = 2  # products a page: so few that short tasks, too, turn pages


class Shop(World):
    """WebShop (arXiv 2207.01206) in miniature: find the product that fits best among N of its type, and buy it.

    >>> env = Shop(2, seed=2)
    >>> env.prompt
    ' want lamp warm small in white under #50 .'
    >>> env.step("query", "search lamp")
    ' left=9 #70 lamp #20 , #14 lamp #0 , end'
    >>> env.step("query", "click #70")
    ' left=8 #70 lamp small warm new in white black green #20'
    >>> env.step("query", "click white"), env.step("answer", "buy"), env.em
    (' left=7 chosen white', '', 2.0)

    Actions: `search words`, `next` page of what was found, `click #id` of a product or `click color` of the one that is
    open, and as answer `buy`. Anything else does nothing. The reward is WebShop's: the share of what was wanted
    (two traits, the color chosen, the price) that the product has, none if it is of another type. It counts N times in
    `em`, so that em / N is the reward.
    """

    def __init__(self, n_objectives=2, seed=0, max_turns=None):
        assert n_objectives + n_objectives // 2 <= len(INDICES), f"n_objectives is {n_objectives}, expected at most {len(INDICES) * 2 // 3}"
        rng = np.random.default_rng(seed)
        pick = lambda words, n: [str(word) for word in rng.choice(words, n, replace=False)]
        super().__init__(n_objectives, max_turns or 2 * n_objectives + 6)
        (self.type, *others), self.traits, (self.color,), self.limit = pick(TYPES, 4), pick(TRAITS, 2), pick(COLORS, 1), 10 * int(rng.integers(3, 6))
        self.prompt = f" want {self.type} {' '.join(self.traits)} in {self.color} under #{self.limit} ."
        self.products = {}  # id -> (type, traits, colors, price)
        for i, index in enumerate(pick(INDICES, n_objectives + n_objectives // 2)):
            self.products[index] = self.type if i < n_objectives else str(rng.choice(others)), pick(TRAITS, 3), pick(COLORS, 3), 10 * int(rng.integers(8))
        if rng.random() < 0.5:  # one that has all
            more = pick([trait for trait in TRAITS if trait not in self.traits], 1), pick([color for color in COLORS if color != self.color], 2)
            index = pick([*self.products][:n_objectives], 1)[0]
            self.products[index] = self.type, pick([*self.traits, *more[0]], 3), pick([self.color, *more[1]], 3), 10 * int(rng.integers(self.limit // 10 + 1))
        self.shelf = pick([*self.products], len(self.products))
        self.results, self.open, self.chosen = [], None, None
        best = max(self.products, key=lambda index: self.worth(index, self.color))
        self.golds, self.best = [(best, "")], n_objectives * self.worth(best, self.color)

    def worth(self, index, color):
        """The reward for buying this product in this color, 0..1."""
        kind, traits, colors, price = self.products[index]
        return (kind == self.type) * (sum(trait in traits for trait in self.traits) + (color == self.color and color in colors) + (price <= self.limit)) / 4

    def act(self, text):
        verb, what, *_ = words(text)[:2] + ["", ""]
        if verb == "search":
            fits = lambda index: -sum(word in (self.products[index][0], *self.products[index][1]) for word in words(text)[1:9])
            self.results = sorted((index for index in self.shelf if fits(index)), key=fits)
        elif verb == "next":
            self.results = self.results[PAGE:]
        elif verb == "click" and what in self.products:
            self.open, self.chosen = what, None
            kind, traits, colors, price = self.products[what]
            return f"{what} {kind} {' '.join(traits)} in {' '.join(colors)} #{price}"
        elif verb == "click" and self.open and what in self.products[self.open][2]:
            self.chosen = what
            return f"chosen {what}"
        else:
            return "nothing happens"
        page = [f"{index} {self.products[index][0]} #{self.products[index][3]}" for index in self.results[:PAGE]]
        return " , ".join([*page, "next" if self.results[PAGE:] else "end"])

    def mark(self, text):
        return 3 * (self.n_objectives * self.worth(self.open, self.chosen) if self.open and words(text) == ["buy"] else 0.0,)

    def expert(self, seen, amnesic=False, style="whole"):
        """The demonstrator: looks at all of the right type, and remembers the best. Its state:

            what the product just seen has of what is wanted ; the best one so far, the same : on this page still to be looked at, next or end
            #12 warm red under                               ; #9 warm                     : #17 #3 next
        """
        kind, wanted, color, limit = re.match(r" want (\w+) ([\w ]+) in (\w+) under #(\d+)", self.prompt).groups()
        wanted = [*wanted.split(), color]
        state, query, info = ([("", "", "")] + re.findall(r"([^<>]*)<query>([^<]*)<end><info>([^<]*)", seen))[-1]
        best, todo = (part.split() for part in (re.findall(r"; ?([^;:]*) ?: ?(.*)", state) + [("", "")])[0])
        best, look, left = [] if amnesic else best, [], int((re.findall(r"left=(\d+)", info) + ["99"])[0])
        product = re.search(r"(#\d+) (\w+) ([\w ]+) in ([\w ]+) #(\d+)", info)
        if product:
            has = product[3].split() + product[4].split() + ["under"] * (int(product[5]) <= int(limit))
            look = [product[1], *(word for word in [*wanted, "under"] if word in has)]
            best = look if product[2] == kind and len(look) > len(best) else best
        elif re.search(r"(next|end)$", info):
            todo = [index for index, its_kind in re.findall(r"(#\d+) (\w+) #\d+", info) if its_kind == kind]
            todo += info.split()[-1:]
        if len(best) > len(wanted) + 1 or left <= 3:  # nothing can be better, or it is time to go back to the best
            todo = ["end"]
        chosen = "chosen" in info
        is_open = best[:1] == look[:1] or chosen
        ready = not best or is_open and (chosen or color not in best)
        action = ("query", f"search {kind}")
        if left == 1 or todo == ["end"] and ready:
            action, todo = ("answer", "buy"), ["end"]
        elif todo == ["end"]:
            action = ("query", f"click {color if is_open else best[0]}")
        elif todo:
            action, todo = ("query", "next" if todo == ["next"] else f"click {todo[0]}"), todo[1:] or todo
        return " ".join([*look, LIST, *best, ":", *todo]), *action


ENVS = ["qa", "web", "dialogue", "shop"]


def farthest(world):
    """The longest horizon that there are indices, and in an invented world names, for."""
    if world.env == "shop":
        return len(INDICES) * 2 // 3  # half as many products more, each with an index
    return len(INDICES) if world.facts else min(len(INDICES) - ("count" in world.kinds), world.names // world.hops[1])


def asked(subject, relations):
    """A question as words: `:: milu pupil neighbour`, a colon for each relation still to be followed.

    With none left it is the answer. So it shows at its first word how much is left to do.
    """
    return [":" * len(relations), subject, *relations] if relations else [subject]


def words(text):
    """Lower-case words of any text: the normalisation of the paper's EM, without its articles."""
    return re.findall(rf"#?{WORD}", text.lower())


def score(text, golds):
    """EM, F1 and partial matches of an answer, summed over the objectives (MEM1 app. A.4): (int, float, int), each 0..N.

    The answer is a list of `#index words`. What stands before the first index counts for nothing;
    of an index that occurs twice the first counts. A match is partial if one of the two contains the other.

    >>> score("#7 dabo #8 kilu mose", [("#7", "dabo"), ("#8", "kilu"), ("#9", "tifa")])
    (1, 1.6666666666666665, 2)
    """
    given, entry = {}, []
    for word in words(text):
        if word.startswith("#"):
            entry = [] if word in given else given.setdefault(word, [])
        else:
            entry.append(word)
    em, f1, partial = 0, 0.0, 0
    for index, gold in golds:
        got, want = given.get(index, []), words(gold)
        common = sum(min(got.count(w), want.count(w)) for w in set(want))
        em += got == want
        f1 += 2 * common / (len(got) + len(want)) if want else not got  # a question withdrawn is not to be answered
        partial += got == want or bool(got and want) and (within(got, want) or within(want, got))
    return em, f1, partial


def within(some, all_words):
    """Whether these words stand next to each other somewhere in those."""
    return any(all_words[i : i + len(some)] == some for i in range(len(all_words)))


REWARDS = {  # of an episode that is over: what its last turn earns. In "step" the turns before earn as well, see ComposedQA.gains
    "em": lambda env: env.em / env.n_objectives,
    "f1": lambda env: env.f1 / env.n_objectives,
    "partial": lambda env: env.partial / env.n_objectives,
    "all": lambda env: float(env.em == env.n_objectives),
    "format": lambda env: env.em / env.n_objectives + 0.2 * (env.cause == "answered"),
    "step": lambda env: env.em / env.n_objectives,
}


def demonstrator(prompt, seen="", amnesic=False, style="whole"):
    """The scripted expert: what to write, (state, kind, text), given the task and `seen`, the context kept of earlier turns.

    It remembers nothing by itself, as the agent does not. Its state first says what was found, then rewrites
    a list a little: the answers so far, the question at hand as far as it is still open, and the index of the
    question to take up next (or `.`). So nothing has to be counted, only looked up and copied. With
    nothing left to ask, or no turn to ask in, the list is the answer, and `.` stands in its place:

        prompt   #64 : jelo pupil #65 :: milu pupil neighbour .
        turn 1   ; #64 : jelo pupil #65                                       query jelo pupil
        turn 2   jelo pupil jero ; #64 jero #65 :: milu pupil neighbour .     query milu pupil
        turn 3   milu pupil zupe ; #64 jero #65 : zupe neighbour .            query zupe neighbour
        turn 4   zupe neighbour veba .                                        answer #64 jero #65 veba

    Where all answers are reduced to one word, the name of the kind behind what was found says that this one changes it:
    `milu pupil jero count ; #18 #65 : ...`. So to compare and to count on are two steps.

    amnesic  it carries no answer on to another turn (in style "apart" the last one, or it would not know where it
             is): what is left for reinforcement to learn is to remember
    style    whole: the state holds all of the memory, the agent will see no other
             fresh: only what is new in it, for an agent whose context keeps older states
             apart: thought, then memory, for an agent that keeps nothing but what stands behind the `;`. Which question is at
             hand must then follow from the answers; in tasks where it does not, "whole" is for such an agent, too

    >>> demonstrator(" #64 : jelo pupil .", "<IS> ; #64 : jelo pupil .<query> jelo pupil<end><info> left=3 jelo pupil jero")
    ('jelo pupil jero .', 'answer', '#64 jero')
    >>> seen = "<IS> ; #17 #64 : jelo pupil #65<query> jelo pupil<end><info> left=3 jelo pupil jero"
    >>> [demonstrator(f" count #17 {name} #64 : jelo pupil #65 : milu heir .", seen)[0] for name in ("jero", "kama")]
    ['jelo pupil jero count ; #18 #65 : milu heir .', 'jelo pupil jero ; #17 #65 : milu heir .']
    """
    head, questions = read_task(prompt)
    answers, changes = read_seen(seen)
    query, info = ([("", "")] + re.findall(r"<query>(.*?)<end><info>([^<]*)", seen))[-1]
    index, subject, relations, then = at_hand(questions, seen, query, answers, changes)
    tally = re.findall(r"; ((?:#\d+ ?)*?) ?(?:#\d+ :|<query>)", seen)[-1:] if head and not amnesic else []
    tally = "".join(tally).strip() or start_of(head)
    if amnesic:
        answers = dict([*answers.items()][-1:]) if style == "apart" else {}

    triples = re.findall(rf"(?<!\S)(?=(#?{WORD}) ({WORD}) (#?{WORD}))", info)
    found = [" ".join(triple) for triple in triples if query and list(triple[:2]) == [subject, *relations[:1]]][:1]
    if found:
        subject, relations = found[0].split()[-1], relations[1:]
    fresh, due, just_said = {}, "left=1 " in info, read_seen(info)[1]
    if then in just_said:
        then = [*(q[0] for q in still_open(questions, changes, then)), STOP][0]
    if then in changes:  # of the task itself nothing is left: now comes what the user said
        questions = []
    if due or index in just_said or not relations:  # this question is done with: the next
        if index not in just_said:
            answers[index] = fresh[index] = subject
            before, tally = tally, fold(head, tally, index, subject)
            found += head[:1] * (tally != before)
            changes.pop(index, None)
        index, subject, relations, then = take_up(still_open(questions, changes, then), answers)
    if due or not relations:  # there is no other
        return " ".join([*found, STOP]), "answer", tally.split()[0] if tally else entries(answers)
    question, memory = [index, *asked(subject, relations), then], tally or entries(fresh if style == "fresh" else answers)
    ahead = {i for i, *_ in itertools.dropwhile(lambda question: question[0] != then, questions)}
    news = " ".join(said(i, *change) for i, change in changes.items() if i != index and (change[0] or i in ahead) and style != "fresh")
    parts = [*question, LIST, memory, news] if style == "apart" else [LIST, memory, *question, news]
    query = f"page {subject}" if f" see page {subject}." in info else f"{subject} {relations[0]}"
    return " ".join(filter(None, [*found, *parts])), "query", query


def read_task(prompt):
    """A task as text -> (head [word, ...], questions [(index, subject, relations, next index), ...])."""
    head = re.match(rf"(?: count #\d+ {WORD}| compare)?", prompt)[0].split()
    questions = re.findall(rf"(#\d+) :+ (#?{WORD})((?: {WORD})+)(?= (#\d+|\.))", prompt)
    return head, [(index, subject, relations.split(), then) for index, subject, relations, then in questions]


def read_seen(seen):
    """What stands in a context: answers {index: answer}, and questions that the user has changed since {index: (subject, relations)}.

    On each index the last word counts. A question of no subject is withdrawn.
    """
    answers, changes = {}, {}
    for match in re.finditer(rf"user (#\d+) (?:-|:+ (#?{WORD})((?: (?!user ){WORD})+))|{ENTRY}", seen):
        changed, subject, relations, index, answer = match.groups()
        for known in answers, changes:
            known.pop(changed or index, None)
        if changed:
            changes[changed] = subject or "", (relations or "").split()
        else:
            answers[index] = answer
    return answers, changes


def said(index, subject, relations):
    """How the user changes a question, and how a state keeps it in mind."""
    return " ".join(["user", index, *(asked(subject, relations) if subject else ["-"])])


def at_hand(questions, seen, query, answers, changes):
    """Which question the last turn was about, as far as it was open then: (index, subject, relations, next index).

    The last state says it. If no state is kept, it follows from the query: it asks for a question's subject, or
    for what the one after the last answer has led to. Else that one begins anew.
    """
    if stated := re.findall(OPEN, seen):
        index, subject, relations, then = stated[-1]
        return index, subject, relations.split(), then
    subject, relation = (query.split() + ["", ""])[:2]
    begun = [index for index, start, *_ in questions if answers.get(start, start) == subject]
    after = [then for index, *_, then in questions if index in answers] or [questions[0][0]]
    index, start, relations, then = take_up(still_open(questions, changes, (begun or after[-1:])[0]), answers)
    if relation in relations:
        return index, subject, relations[relations.index(relation) :], then
    return index, start, relations, then


def still_open(questions, changes, then):
    """The questions from `then` on, and those that the user has changed or added, as he has them now."""
    rest = [question[:3] for question in itertools.dropwhile(lambda question: question[0] != then, questions) if question[0] not in changes]
    rest += [(index, *change) for index, change in changes.items() if change[0]]
    return [(*question, then) for question, then in zip(rest, [*(index for index, *_ in rest[1:]), STOP])]


def take_up(questions, answers):
    """The first question that can be asked: one about an earlier answer needs that answer."""
    for index, subject, relations, then in questions:
        subject = answers.get(subject, subject)
        if not subject.startswith("#"):
            return index, subject, relations, then
    return "", "", [], ""


def entries(answers):
    """`#64 jero #65 veba`"""
    return " ".join(f"{index} {answer}" for index, answer in answers.items() if index)


def primer(rng, longest, more=(), kinds=()):
    """One exercise in reading, on random words: (text, [(words, is it to be learned), ...]).

    What a pretrained language model brings along and random weights do not: to copy a list, to
    edit it while copying, to look things up. No environment, no turn, no episode, nothing to
    remember or to prune. Lists have 2 to `longest` items; `more` are words besides the names of this world. Kinds of tasks
    that reduce their answers bring an exercise each: random weights know neither what comes after #17 nor which number is larger.

    >>> text, answer = primer(np.random.default_rng(54), 3)
    >>> text
    ' #17 :: gezo deputy rival #24 : ropu deputy . ; #17 bize #24 .'
    >>> answer
    [(' append', False), (' ; #17 bize #24 : ropu deputy .', True), (' .', True)]
    >>> primer(np.random.default_rng(21), 3, kinds=["count"])  # doctest: +NORMALIZE_WHITESPACE
    (' count #8 teba', [(' count', False), (' #61 supa', False), (' ; #8', True), (' #30 teba', False), (' count ; #9', True),
     (' .', True)])
    """
    n, names = int(rng.integers(2, longest + 1)), [*NAMES, *more]
    draw = lambda k, pool: [pool[i] for i in rng.choice(len(pool), k, replace=False)]  # k different words
    any_of = lambda pool: pool[rng.integers(len(pool))]
    keys, values = draw(n, INDICES), [any_of(names) for _ in range(n)]
    pairs = [f"{key} {value}" for key, value in zip(keys, values)]
    sections = [" ".join(asked(any_of(names), draw(rng.integers(1, 4), RELATIONS))) for _ in keys]
    sections = [f"{section} {then}" for section, then in zip(sections, [*keys[1:], STOP])]  # up to and with the next heading
    skill = any_of([*SKILLS, *(kind for kind in REDUCED if kind in kinds)])
    if skill == "copy":  # a list of words
        text = draw(n, names)
        target = [(text, True)]
    elif skill == "edit":  # a list that ends in an open question; then the answer to its first step comes: copy the list with that step done
        chain, answer, then = draw(rng.integers(1, 4), RELATIONS), any_of(names), any_of([*INDICES, STOP])
        text = [LIST, *pairs[:-1], keys[-1], *asked(values[-1], chain), then, STOP, answer]
        target = [([LIST, *pairs[:-1], keys[-1], *asked(answer, chain[1:]), then], True)]
    elif skill == "append":  # a list of pairs, and behind it the section that its last key names
        some = rng.permutation(n)[: rng.integers(1, n + 1)]
        text = [keys[0], *sections, LIST, *(pairs[i] for i in some[:-1]), keys[some[-1]], STOP]
        target = [([*text[n + 1 : -1], sections[some[-1]]], True)]
    elif skill == "recall":  # the values of some keys
        text, target = pairs, [part for i in rng.permutation(n)[:8] for part in (([keys[i]], False), ([values[i]], True))]
    elif skill == "section":  # what stands under some headings
        text, target = [keys[0], *sections], [part for i in rng.permutation(n)[:4] for part in (([keys[i]], False), ([sections[i]], True))]
    elif skill == "fact":  # what stands behind two given words, where each of them occurs elsewhere too
        subjects, relations = draw(max(2, n // 3), names), draw(3, RELATIONS)
        facts = [(f"{s} {r}", any_of(names)) for s in subjects for r in relations]
        facts = [facts[i] for i in rng.permutation(len(facts))[:n]]
        text = [f"{head} {value}," for head, value in facts]
        target = [part for i in rng.permutation(len(facts))[:8] for part in (([facts[i][0]], False), ([facts[i][1]], True))]
    else:  # the next number, the same word, the larger number: of one answer after the other, does it count, and to what (what was before is in view)
        head, draw_answer = reduction(skill, min(n, 8), rng)
        text, target, tally = head, [], start_of(head)
        for key in keys[:8]:
            answer, before = draw_answer(), tally
            tally = fold(head, tally, key, answer)
            target += [([key, answer], False), ([*head[:1] * (tally != before), LIST, tally], True)]
    phrase = lambda some: " " + " ".join(some)
    return phrase(text), [(phrase([skill]), False), *((phrase(some), learn) for some, learn in target), (phrase([STOP]), True)]
