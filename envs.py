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
3) the turn budget follows from the number of hops (longest chain x N + 2) instead of 6 or 20.
"""
import itertools
import math
import re

import numpy as np

# ----------------------------------------------------------------------------------------------
# The words of this world. Each is one token for the agent (mem1.py), names are invented.

RELATIONS = ("heir rival mentor ally spouse pupil guard cousin deputy doctor tenant neighbour").split()
_SYLLABLES = [c + v for c in "bdfgjklmnprstvz" for v in "aeiou"]
NAMES = [a + b for a, b in itertools.product(_SYLLABLES, _SYLLABLES) if a != b]
NAMES = [str(name) for name in np.random.default_rng(2506).permutation(NAMES)[:200]]
INDICES = [f"#{i}" for i in range(80)]  # wider than the longest horizon to be tested
COLONS = [":" * i for i in range(1, 6)]  # see asked()
LIST = ";"  # begins the list that an agent keeps
STOP = "."  # ends the list of questions, where otherwise the next index would stand
SKILLS = "copy edit append recall fact section".split()  # the skills of reading, see primer()
WORDS = [*NAMES, *RELATIONS, *INDICES, *SKILLS, *COLONS, LIST, STOP, "left", "answer", "now", "nothing", "found"]


class ComposedQA:
    """N multi-hop questions over a private knowledge base, behind a search tool.

    n_objectives  N, the horizon
    hops          (fewest, most) relations in a question
    distractors   facts on the same subject that are not asked for
    top_k         facts that a search returns at most
    seed          anything that numpy's SeedSequence takes; the same seed gives the same episode
    max_turns     turn budget, answer included; None: longest chain x N + 2

    After the last step: `em` and `f1` are sums over objectives (0..N), `cause` says what ended it.
    """

    def __init__(self, n_objectives=2, hops=(1, 2), distractors=2, top_k=3, seed=0, max_turns=None):
        assert 1 <= n_objectives <= len(INDICES), f"n_objectives is {n_objectives}, expected 1 to {len(INDICES)}"
        assert n_objectives <= farthest(hops), f"{n_objectives} objectives of {hops[1]} hops need more than the {len(NAMES)} names there are"
        assert 1 <= hops[0] <= hops[1] and hops[1] + distractors <= len(RELATIONS), f"hops {hops}, distractors {distractors}"
        rng = np.random.default_rng(seed)
        self.n_objectives, self.top_k = n_objectives, top_k
        self.max_turns = max_turns or hops[1] * n_objectives + 2
        self.turn, self.done, self.cause, self.em, self.f1 = 0, False, None, 0, 0.0

        first = int(rng.integers(len(INDICES) - n_objectives + 1))  # a random start: see every index in training
        subjects = iter(rng.permutation(NAMES))  # a name is the subject of one chain only
        self.facts, self.questions, self.golds = [], [], []
        for i in range(n_objectives):
            relations = [str(r) for r in rng.permutation(RELATIONS)]
            chain, others = relations[: rng.integers(hops[0], hops[1] + 1)], relations[hops[1] :]
            subject = start = str(next(subjects))
            for j, relation in enumerate(chain):
                answer = str(rng.choice(NAMES)) if j == len(chain) - 1 else str(next(subjects))
                facts = [(relation, answer)]
                facts += [(str(r), str(rng.choice(NAMES))) for r in rng.choice(others, distractors, replace=False)]
                self.facts += [f"{subject} {r} {o}" for r, o in facts]
                subject = answer
            self.questions.append(" ".join([INDICES[first + i], *asked(start, chain)]))
            self.golds.append((INDICES[first + i], answer))
        self.facts = [self.facts[i] for i in rng.permutation(len(self.facts))]
        self.prompt = " " + " ".join([*self.questions, STOP])
        self._index_facts()

    def step(self, kind, text):
        """One turn: `kind` is "query" or "answer", `text` any string at all. Returns the observation.

        Every observation says how many turns are left (MEM1 sec. 4.1), and with one left that the
        answer is due. Any other kind is malformed output: it ends the episode with nothing earned.
        """
        assert not self.done, "step() after the end of the episode"
        self.turn += 1
        left = self.max_turns - self.turn
        if kind == "query" and left > 0:
            return f" left={left}{' answer now' if left == 1 else ''} {', '.join(self.search(text)) or 'nothing found'}"
        self.done, self.cause = True, {"answer": "answered", "query": "out of turns"}.get(kind, "malformed")
        if kind == "answer":
            self.em, self.f1 = score(text, self.golds)
        return ""

    def _index_facts(self):
        """BM25 (k1 1.2, b 0, since facts are of equal length) of every word in every fact, ahead of time.

        A fact is a page whose title is its subject, so the subject counts twice: the page *about*
        a name comes before the pages that mention it.
        """
        pages = [[fact.split()[0], *fact.split()] for fact in self.facts]
        df = {}
        for word in itertools.chain.from_iterable(map(set, pages)):
            df[word] = df.get(word, 0) + 1
        self._postings = {}  # word -> {page: weight}
        for i, page in enumerate(pages):
            for word in set(page):
                idf, tf = math.log(1 + (len(pages) - df[word] + 0.5) / (df[word] + 0.5)), page.count(word)
                self._postings.setdefault(word, {})[i] = idf * tf * 2.2 / (tf + 1.2)

    def search(self, query):
        """The `top_k` facts that match `query` best, in the knowledge base's own (random) order.

        Not in the order of their rank: the agent has to read what it got, not to take the first.
        """
        scores = {}
        for word in words(query)[:64]:  # of an over-long query the beginning counts
            for page, weight in self._postings.get(word, {}).items():
                scores[page] = scores.get(page, 0.0) + weight
        best = sorted(scores, key=lambda page: (-scores[page], page))[: self.top_k]
        return [self.facts[page] for page in sorted(best)]


def farthest(hops):
    """The longest horizon that there are indices and names for."""
    return min(len(INDICES), len(NAMES) // hops[1])


def asked(subject, relations):
    """A question as words: `:: milu pupil neighbour`, a colon for each relation still to be followed.

    With none left it is the answer. So it shows at its first word how much is left to do.
    """
    return [":" * len(relations), subject, *relations] if relations else [subject]


def words(text):
    """Lower-case words of any text: the normalisation of the paper's EM, without its articles."""
    return re.findall(r"#?\w+", text.lower())


def score(text, golds):
    """EM and F1 of an answer, summed over the objectives (MEM1 app. A.4): (int 0..N, float 0..N).

    The answer is a list of `#index words`. What stands before the first index counts for nothing;
    of an index that occurs twice the first counts.

    >>> score("#7 dabo #8 kilu mose", [("#7", "dabo"), ("#8", "kilu"), ("#9", "tifa")])
    (1, 1.6666666666666665)
    """
    given, entry = {}, []
    for word in words(text):
        if word.startswith("#"):
            entry = [] if word in given else given.setdefault(word, [])
        else:
            entry.append(word)
    em, f1 = 0, 0.0
    for index, gold in golds:
        got, want = given.get(index, []), words(gold)
        common = sum(min(got.count(w), want.count(w)) for w in set(want))
        em += got == want
        f1 += 2 * common / (len(got) + len(want))
    return em, f1


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

    amnesic  it carries no answer on to another turn (in style "apart" the last one, or it would not know where it
             is): what is left for reinforcement to learn is to remember
    style    whole: the state holds all of the memory, the agent will see no other
             fresh: only what is new in it, for an agent whose context keeps older states
             apart: thought, then memory, for an agent that keeps nothing but what stands behind the `;`

    >>> demonstrator(" #64 : jelo pupil .", "<IS> ; #64 : jelo pupil .<query> jelo pupil<end><info> left=3 jelo pupil jero")
    ('jelo pupil jero .', 'answer', '#64 jero')
    """
    questions = {index: (subject, relations.split()) for index, subject, relations in re.findall(r"(#\d+) :+ (\w+)((?: \w+)+)", prompt)}
    following = dict(zip(["", *questions], [*questions, STOP]))  # each index to the next, "" to the first, the last to `.`
    answers = dict(re.findall(r"(#\d+) (\w+)", seen))
    query, info = ([("", "")] + re.findall(r"<query>(.*?)<end><info>([^<]*)", seen))[-1]
    index, subject, relations, then = at_hand(seen, query, questions, following, answers)
    if amnesic:
        answers = dict([*answers.items()][-1:]) if style == "apart" else {}

    found = re.findall(rf"\b{re.escape(subject)} {re.escape(relations[0])} \w+", info)[:1] if query and relations else []
    if found:
        subject, relations = found[0].split()[-1], relations[1:]
    fresh, due = {}, "answer now" in info
    if due or not relations:  # this question is done with: the next
        if index in questions:
            answers[index] = fresh[index] = subject
        index, (subject, relations), then = then, questions.get(then, ("", [])), following.get(then, "")
    if due or not relations:  # there is no other
        return " ".join([*found, STOP]), "answer", entries(answers)
    question, memory = [index, *asked(subject, relations), then], entries(fresh if style == "fresh" else answers)
    parts = [*question, LIST, memory] if style == "apart" else [LIST, memory, *question]
    return " ".join(filter(None, [*found, *parts])), "query", f"{subject} {relations[0]}"


def at_hand(seen, query, questions, following, answers):
    """Which question the last turn was about, as far as it was open then: (index, subject, relations, next index).

    The last state says it. If no state is kept, it follows from the query: it asks for a question's subject, or
    for what the one after the last answer has led to. Else that one begins anew.
    """
    stated = re.findall(r"(#\d+) :+ (\w+)((?: \w+)*) (#\d+|\.)", seen)
    if stated:
        index, subject, relations, then = stated[-1]
        return index, subject, relations.split(), then
    subject, relation = (query.split() + ["", ""])[:2]
    after = following[["", *(i for i in answers if i in questions)][-1]]
    index = next((i for i in questions if questions[i][0] == subject), after)
    start, relations = questions.get(index, ("", []))
    if relation in relations:
        return index, subject, relations[relations.index(relation) :], following[index]
    return index, start, relations, following.get(index, "")


def entries(answers):
    """`#64 jero #65 veba`"""
    return " ".join(f"{index} {answer}" for index, answer in answers.items())


def primer(rng, longest):
    """One exercise in reading, on random words: (text, [(words, is it to be learned), ...]).

    What a pretrained language model brings along and random weights do not: to copy a list, to
    edit it while copying, to look things up. No environment, no turn, no episode, nothing to
    remember or to prune. Lists have 2 to `longest` items.

    >>> text, answer = primer(np.random.default_rng(54), 3)
    >>> text
    ' #17 :: gezo deputy rival #24 : ropu deputy . ; #17 bize #24 .'
    >>> answer
    [(' append', False), (' ; #17 bize #24 : ropu deputy .', True), (' .', True)]
    """
    n = int(rng.integers(2, longest + 1))
    draw = lambda k, pool: [str(word) for word in rng.choice(pool, k, replace=False)]  # k different words
    any_of = lambda pool: pool[rng.integers(len(pool))]
    keys, values = draw(n, INDICES), [any_of(NAMES) for _ in range(n)]
    pairs = [f"{key} {value}" for key, value in zip(keys, values)]
    sections = [" ".join(asked(any_of(NAMES), draw(rng.integers(1, 4), RELATIONS))) for _ in keys]
    sections = [f"{section} {then}" for section, then in zip(sections, [*keys[1:], STOP])]  # up to and with the next heading
    skill = any_of(SKILLS)
    if skill == "copy":  # a list of words
        text = draw(n, NAMES)
        target = [(text, True)]
    elif skill == "edit":  # a list of pairs with a question at its end, that comes by the answer to its first step
        chain, answer, then = draw(rng.integers(1, 4), RELATIONS), any_of(NAMES), any_of([*INDICES, STOP])
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
        subjects, relations = draw(max(2, n // 3), NAMES), draw(3, RELATIONS)
        facts = [(f"{s} {r}", any_of(NAMES)) for s in subjects for r in relations]
        facts = [facts[i] for i in rng.permutation(len(facts))[:n]]
        text = [f"{head} {value}," for head, value in facts]
        target = [part for i in rng.permutation(len(facts))[:8] for part in (([facts[i][0]], False), ([facts[i][1]], True))]
    phrase = lambda words: " " + " ".join(words)
    return phrase(text), [(phrase([skill]), False), *((phrase(words), learn) for words, learn in target), (phrase([STOP]), True)]
