"""envs.py: the tasks, as text in and text out. No torch, no tokens.

    >>> env = ComposedQA(n_objectives=2, seed=3)
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

A task is composed of N independent questions (MEM1 sec. 3.4). A question is an index, a name and a
chain of relations: `#65 :: milu pupil neighbour` asks for the neighbour of the pupil of milu. The
facts are drawn anew for every episode, so nothing can be memorised in the weights: the agent has to
search for each hop, and has to carry each answer to the end, where all of them are due at once.

Differs from the paper's (sec. 4.1): a private random knowledge base under BM25 instead of Wikipedia
under a dense retriever; answers by index, not by place; a turn budget that follows from the task.
"""
import importlib
import itertools
import math
import re
from collections import Counter, defaultdict
from enum import IntEnum

import numpy as np

# --- Randomness. Training, validation and test episodes never share a key.

Stream = IntEnum("Stream", "PRIMER DEMOS PPO VALID TEST", start=0)


def keyed_rng(seed, stream, step, episode, what=0):
    """The generator of one thing: what it draws depends on its key and on nothing else.

    `what` tells several draws of one episode apart: 0 the task, 1 which piece of it is the agent's,
    its turn budget and its history, 2 the agent's or the demonstrator's choices, 3 the shuffling of
    minibatches.
    """
    return np.random.default_rng([seed, stream, step, episode, what])


# --- Words. Those of WORDS are one token each for the agent (mem1.py). Names are invented.

RELATIONS = """heir rival mentor ally spouse pupil guard cousin deputy doctor tenant
               neighbour""".split()
_SYLLABLES = [c + v for c in "bdfgjklmnprstvz" for v in "aeiou"]
_PAIRS = [a + b for a, b in itertools.permutations(_SYLLABLES, 2)]
NAMES = np.random.default_rng(2506).permutation(_PAIRS)[:200].tolist()
INDICES = [f"#{i}" for i in range(80)]  # more than the longest horizon to be tested
COLONS = [":" * i for i in range(1, 6)]  # see question_words()
LIST = ";"  # begins the list of answers that an agent keeps
STOP = "."  # ends the questions of a task
SKILLS = "copy edit append recall fact note section".split()  # see exercise_text()
WORDS = [*NAMES, *RELATIONS, *INDICES, *SKILLS, *COLONS, LIST, STOP, "left", "answer", "now",
         "nothing", "found"]

DISTRACTORS = 2  # facts on the same subject that are not asked for
TOP_K = 3  # facts that a search returns at most

WORD = r"[^\s!-/:-@\[-^`{-~]+"  # of any script: no white space, no ASCII punctuation but `_`
ENTRY = rf"(#\d+) ({WORD})"  # in a state or an answer: index, answer
# In a prompt or a state: index, subject, relations, index of the next question.
QUESTION = rf"(#\d+) :+ ({WORD})((?: {WORD})*)(?= (#\d+|\.))"


def words(text):
    """Lower-case words of any text: EM normalisation of the paper's evaluation (articles stay)."""
    return re.findall(rf"#?{WORD}", text.lower())


def question_words(subject, relations):
    """A question as words, with a colon for each hop that is left; with none, just the answer.

    >>> question_words("milu", ["pupil", "neighbour"]), question_words("veba", [])
    (['::', 'milu', 'pupil', 'neighbour'], ['veba'])
    """
    if not relations:
        return [subject]
    return [":" * len(relations), subject, *relations]


# --- Environments


class Env:
    """A task of N objectives, turn by turn. A subclass adds prompt, golds, act() and expert(); if
    they are needed, random_notes(), take_piece() and answers_shown().

    prompt  the task as text
    golds   [(index, answer), ...], the right answers
    """
    turns_per_hop = 1  # turns allowed per hop
    longest = len(INDICES)  # most objectives
    needs = {}  # flags that train.py must be given
    extra_words = ()  # one token each, as those of WORDS

    def __init__(self, n_objectives, max_turns):
        self.n_objectives = n_objectives
        self.max_turns = max_turns
        self.n_questions = n_objectives  # in the prompt; the agent's may be a piece: take_piece()
        self.history = []  # turns played before the agent's first one, as mem1.Turn
        self.paths = {}  # {index: facts that lead to the answer}, if any
        self.turn = 0
        self.done = False
        self.cause = None  # what ended the episode: "answered", "out of turns" or "malformed"
        self.em = 0  # after the last step: objectives answered exactly, 0..N

    def answers_shown(self, query, info):
        """Answers {(index, answer), ...} that an <info> shows; none where no list is kept."""
        return set()

    def grade(self, text):
        """EM of an answer."""
        return score(text, self.golds)

    def step(self, kind, text):
        """One turn: `kind` is "query" or "answer", `text` any string. Returns the observation.

        Every observation says how many turns are left (MEM1 sec. 4.1) and, if one, that the answer
        is due. Any kind but these two is malformed output: it ends the episode and earns nothing.

        >>> ComposedQA(1, max_turns=2).step("query", "nobody")
        ' left=1 answer now nothing found'
        """
        assert not self.done, "step() after the end of the episode"
        self.turn += 1
        left = self.max_turns - self.turn
        if kind == "query" and left > 0:
            warning = " answer now" if left == 1 else ""
            return f" left={left}{warning} {self.act(text)}"
        self.done = True
        self.cause = {"answer": "answered", "query": "out of turns"}.get(kind, "malformed")
        if kind == "answer":
            self.em = self.grade(text)
        return ""


class ComposedQA(Env):
    """N multi-hop questions over a knowledge base, with a search tool.

    n_objectives  N, the horizon
    hops          (fewest, most) relations in a question
    seed          a number or a list of numbers; the same seed gives the same episode
    max_turns     turn budget, answer included; None: most hops x N + 2
    """

    def __init__(self, n_objectives=2, hops=(1, 2), seed=0, max_turns=None):
        super().__init__(n_objectives, max_turns or hops[1] * n_objectives + 2)
        rng = np.random.default_rng(seed)
        first = int(rng.integers(len(INDICES) - n_objectives + 1))  # so training sees every index
        indices = INDICES[first : first + n_objectives]
        questions, self.engine = self.compose(indices, hops, rng)

        sections = []
        for index, (subject, relations, path) in zip(indices, questions):
            sections += [index, *question_words(subject, relations)]
            self.paths[index] = path
        self.prompt = " " + " ".join([*sections, STOP])
        self.golds = [(index, path[-1].split()[2]) for index, path in self.paths.items()]

    def compose(self, indices, hops, rng):
        """The questions [(subject, relations, path), ...], and the search engine."""
        questions, facts = invent(indices, hops, rng)
        return questions, SearchIndex([(fact.split()[0], fact) for fact in facts])

    def search(self, query):
        """The facts that match a query best, as texts."""
        return self.engine.search(query)

    def act(self, text):
        return ", ".join(self.search(text)) or "nothing found"

    def answers_shown(self, query, info):
        """The answers {(index, answer), ...} that an <info> shows and that `query` asked for: by
        subject, by relation, or by both.

        >>> env = ComposedQA(n_objectives=2, seed=3)
        >>> env.answers_shown(" pupil jelo", " left=5 jelo pupil jero, zupe neighbour veba")
        {('#64', 'jero')}
        """
        asked_for = set(words(query))
        found = set()
        for index, path in self.paths.items():
            subject, relation, answer = path[-1].split()
            if asked_for and asked_for <= {subject, relation} and path[-1] in info:
                found.add((index, answer))
        return found

    def take_piece(self, first, n):
        """Score n questions from number `first` on, and no others."""
        self.n_objectives = n
        self.golds = self.golds[first : first + n]
        self.paths = {index: self.paths[index] for index, _ in self.golds}

    def expert(self, seen, fresh=False):
        """The demonstrator's turn (state, kind, text). It sees what the agent sees, no more."""
        return oracle_notes(self.prompt, seen, fresh)

    def random_notes(self, seen, rng):
        """As expert(), with random notes."""
        return random_notes(rng, seen, *self.expert(seen))


def invent(indices, hops, rng):
    """A private world: (questions [(subject, relations, path), ...], facts).

    `path` lists the facts that lead to the answer; `facts` are all there are, shuffled.
    """
    names = (NAMES[i] for i in rng.permutation(len(NAMES)))  # a name is the subject of one hop only
    questions, facts = [], []
    for _ in indices:
        relations = rng.permutation(RELATIONS).tolist()
        asked_for = relations[: rng.integers(hops[0], hops[1] + 1)]
        others = relations[hops[1] :]
        start = subject = next(names)
        path = []
        for relation in asked_for:
            answer = rng.choice(NAMES) if relation == asked_for[-1] else next(names)
            path.append(f"{subject} {relation} {answer}")
            facts.append(path[-1])
            for other in rng.choice(others, DISTRACTORS, replace=False):
                facts.append(f"{subject} {other} {NAMES[rng.integers(len(NAMES))]}")
            subject = answer
        questions.append((start, asked_for, path))
    return questions, rng.permutation(facts).tolist()


# --- The search tool; worlds by name


class SearchIndex:
    """BM25 (k1 1.2, b 0, since pages are of about equal length) over pages [(title, text), ...].

    Words of the title count twice: the page *about* a name comes before pages that mention it.
    """

    def __init__(self, pages):
        self.texts = [text for _, text in pages]
        bags = [words(f"{title} {text}") for title, text in pages]
        df = Counter(word for bag in bags for word in set(bag))
        self.postings = defaultdict(dict)  # word -> {number of a page: weight}
        for page, bag in enumerate(bags):
            for word in set(bag):
                idf = math.log(1 + (len(bags) - df[word] + 0.5) / (df[word] + 0.5))
                tf = bag.count(word)
                self.postings[word][page] = idf * tf * 2.2 / (tf + 1.2)

    def search(self, query):
        """The TOP_K texts that match `query` best, in the (random) order of the pages.

        Not in order of rank: the agent has to read the results, and cannot just take the first.
        """
        scores = Counter()
        for word in words(query)[:64]:  # only the beginning of an over-long query counts
            for page, weight in self.postings.get(word, {}).items():
                scores[page] += weight

        def rank(page):
            # Of pages of equal score, the exact fact comes first: facts that share its words could
            # otherwise crowd it out.
            exact = self.texts[page].lower().startswith(f"{query.strip().lower()} ")
            return -scores[page], not exact, page

        best = sorted(scores, key=rank)[:TOP_K]
        return [self.texts[page] for page in sorted(best)]


def world(name):
    """The Env of this name: ComposedQA, or `World` of experiments/NAME.py. ValueError if none."""
    if name == "qa":
        return ComposedQA
    try:
        return importlib.import_module(f"experiments.{name}").World
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"--env {name}: no such world in experiments/ ({error})")


def longest_horizon(cfg):
    """The most objectives for which a world has enough indices and names."""
    return min(world(cfg.env).longest, len(NAMES) // cfg.hops[1])


# --- The score


def score(text, golds):
    """EM of an answer, summed over the objectives (MEM1 app. A.4), 0..N.

    The answer is a list of `#index words`. Anything before the first index is ignored; of an index
    that occurs twice, the first entry counts. F1 is left out: for one-word answers, about the same.

    >>> score("#7 dabo #8 kilu mose", [("#7", "dabo"), ("#8", "kilu"), ("#9", "tifa")])
    1
    """
    given = {}
    for section in " ".join(words(text)).split("#")[1:]:
        index, *entry = section.split()
        given.setdefault(f"#{index}", entry)
    return len([index for index, gold in golds if given.get(index) == words(gold)])


# --- The demonstrator


def oracle_notes(prompt, seen="", fresh=False):
    """A turn (state, kind, text) of the demonstrator, given the prompt and `seen`.

    `seen` is the context kept from earlier turns, as text. Like the agent, it has no memory of its
    own. Its state first says what was found, then updates a list: the answers so far, what
    is still open of the current question, and the index of the next question (or `.`). So nothing
    has to be counted, only looked up and copied. With nothing left to ask, or no turn left to ask
    in (the open subject is then its guess), the list becomes the answer, and `.` replaces it:

        prompt   #64 : jelo pupil #65 :: milu pupil neighbour .
        turn 1   ; #64 : jelo pupil #65                                     query jelo pupil
        turn 2   jelo pupil jero ; #64 jero #65 :: milu pupil neighbour .   query milu pupil
        turn 3   milu pupil zupe ; #64 jero #65 : zupe neighbour .          query zupe neighbour
        turn 4   zupe neighbour veba .                                      answer #64 jero #65 veba

    fresh: only new answers in the list, for an agent whose context keeps older states.

    >>> seen = "<IS> ; #64 : jelo pupil .<query> jelo pupil<end><info> left=3 jelo pupil jero"
    >>> oracle_notes(" #64 : jelo pupil .", seen)
    ('jelo pupil jero .', 'answer', '#64 jero')
    """
    info = seen.rpartition("<info>")[2]  # the last result; "" in the first turn
    answers = read_answers(seen)
    questions = read_questions(prompt)
    # What is still open of the current question: the last state says so.
    index, subject, relations, next_index = (read_questions(seen) or questions[:1])[-1]

    # What did the last search find? If anything, one hop of the current question is done.
    found = []
    if relations:
        match = re.search(rf"(?<!\S){re.escape(f'{subject} {relations[0]}')} ({WORD})", info)
        if match:
            found = [match[0]]
            subject, relations = match[1], relations[1:]

    # If that was the last hop, list the answer and go on to the next question, or answer.
    new = {}
    last_turn = "left=1 " in info
    if last_turn or not relations:
        answers[index] = new[index] = subject
        rest = [question for question in questions if question[0] == next_index]
        if last_turn or not rest:
            return " ".join([*found, STOP]), "answer", entries(answers)
        index, subject, relations, next_index = rest[0]

    noted = entries(new if fresh else answers)
    state = [*found, LIST, noted, index, *question_words(subject, relations), next_index]
    return " ".join(filter(None, state)), "query", f"{subject} {relations[0]}"


def random_notes(rng, seen, state, kind, text):
    """The same turn (state, kind, text) as written by a demonstrator whose notes are random.

    It searches, carries on its list and answers like oracle_notes(). But when it leaves a question,
    it notes a name picked at random from the facts in view, which is the answer one time in six.
    (The last question goes straight into the answer, and is not random.) So imitation teaches how
    to note, but not what is worth noting: that is left to the reward.

    >>> seen = ("<IS> ; #63 pali #64 : jelo pupil #65<query> jelo pupil<end>"
    ...         "<info> left=3 jelo heir veba, jelo pupil jero")
    >>> turn = "jelo pupil jero ; #63 pali #64 jero #65 : milu heir .", "query", "milu heir"
    >>> for seed in 0, 1, 4:
    ...     random_notes(np.random.default_rng(seed), seen, *turn)[0]
    'jelo pupil jero ; #63 pali #64 jero #65 : milu heir .'
    'jelo pupil jero ; #63 pali #64 veba #65 : milu heir .'
    'jelo pupil jero ; #63 pali #64 jelo #65 : milu heir .'
    """
    answers = read_answers(seen)
    found, _, listed = state.partition(LIST)
    question = re.search(r"#\d+ :.*|$", listed)[0]  # an answer has none
    index = ([""] + re.findall(r"(#\d+) :", seen))[-1]
    info = seen.rpartition("<info>")[2]
    in_view = [word for word in words(info) if word in NAMES]
    if index and in_view and not question.startswith(f"{index} "):
        answers[index] = str(rng.choice(in_view))
    if kind == "query":
        parts = [found.strip(), LIST, entries(answers), question]
        return " ".join(filter(None, parts)), kind, text
    final = read_answers(text)  # what it has just found is in view
    if index in final:
        answers[index] = final[index]
    return state, kind, entries(answers)


def read_questions(text):
    """A prompt or a state -> its questions [(index, subject, relations, next index), ...].

    >>> read_questions(" #64 : jelo pupil #65 :: milu pupil neighbour .")
    [('#64', 'jelo', ['pupil'], '#65'), ('#65', 'milu', ['pupil', 'neighbour'], '.')]
    """
    return [(index, subject, relations.split(), next_index)
            for index, subject, relations, next_index in re.findall(QUESTION, text)]


def read_answers(seen):
    """The answers {index: answer} that stand in a context; for each index the last one counts.

    >>> read_answers("#1 jero #2 veba #1 koki")
    {'#2': 'veba', '#1': 'koki'}
    """
    answers = {}
    for index, answer in re.findall(ENTRY, seen):
        answers.pop(index, None)
        answers[index] = answer
    return answers


def entries(answers):
    """{"#64": "jero", "#65": "veba"} -> `#64 jero #65 veba`"""
    return " ".join(f"{index} {answer}" for index, answer in answers.items())


# --- Reading exercises


def exercise_text(rng, longest, more=()):
    """One exercise in reading, on random words: (text, [(part, is_trained), ...]).

    What a pretrained language model can do and random weights cannot: copy a list, edit it while
    copying, look things up, pick any of several. Lists have 2 to `longest` items; `more` are words
    besides NAMES.

    >>> exercise_text(np.random.default_rng(54), 3)  # doctest: +NORMALIZE_WHITESPACE
    (' #17 :: gezo deputy rival #24 : ropu deputy . ; #17 bize #24 .',
     [(' append', False), (' ; #17 bize #24 : ropu deputy .', True), (' .', True)])
    """
    names = [*NAMES, *more]

    def one_of(pool):
        return pool[rng.integers(len(pool))]

    def some_of(pool, k):  # k different ones
        return [pool[i] for i in rng.choice(len(pool), k, replace=False)]

    def shuffled(pool):
        return [pool[i] for i in rng.permutation(len(pool))]

    n = int(rng.integers(2, longest + 1))
    keys = some_of(INDICES, n)
    values = [one_of(names) for _ in keys]
    pairs = [f"{key} {value}" for key, value in zip(keys, values)]
    sections = []  # questions, each up to and with the next index
    for next_index in [*keys[1:], STOP]:
        question = question_words(one_of(names), some_of(RELATIONS, rng.integers(1, 4)))
        sections.append(" ".join([*question, next_index]))

    target, lookups = [], []
    skill = one_of(SKILLS)
    if skill == "copy":  # a list of words
        text = some_of(names, n)
        target = [(text, True)]
    elif skill == "edit":  # copy a list that ends in an open question, and do one hop of it
        chain = some_of(RELATIONS, rng.integers(1, 4))
        answer = one_of(names)
        next_index = one_of([*INDICES, STOP])
        listed = [LIST, *pairs[:-1], keys[-1]]
        text = [*listed, *question_words(values[-1], chain), next_index, STOP, answer]
        target = [([*listed, *question_words(answer, chain[1:]), next_index], True)]
    elif skill == "append":  # copy a list of pairs, and add the section that its last key names
        order = rng.permutation(n)[: rng.integers(1, n + 1)]
        listed = [LIST, *(pairs[i] for i in order[:-1]), keys[order[-1]]]
        text = [keys[0], *sections, *listed, STOP]
        target = [([*listed, sections[order[-1]]], True)]
    elif skill == "recall":  # the values of some keys
        text = pairs
        lookups = shuffled([*zip(keys, values)])[:8]
    elif skill == "section":  # the sections of some keys
        text = [keys[0], *sections]
        lookups = shuffled([*zip(keys, sections)])[:4]
    else:  # fact, note: the value of a fact, given its first two words ...
        subjects = some_of(names, max(2, n // 3))
        relations = some_of(RELATIONS, 3)
        facts = [(f"{s} {r}", one_of(names)) for s in subjects for r in relations]
        facts = shuffled(facts)[:n]
        text = [f"{head} {value}," for head, value in facts]
        lookups = shuffled(facts)[:8]
        if skill == "note":  # ... or, for any index, one of the values of the first three facts
            text = text[:3]
            lookups = [(key, one_of(facts[:3])[1]) for key in keys[:8]]

    for given, wanted in lookups:
        target += [([given], False), ([wanted], True)]
    target = [([skill], False), *target, ([STOP], True)]
    parts = [(" ".join(["", *part]), is_trained) for part, is_trained in target]
    return " ".join(["", *text]), parts
