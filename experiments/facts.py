"""facts.py: questions about the facts of a file, instead of a world invented for each episode.

    python train.py --facts assets/countries.tsv --demos oracle --out runs/countries
    python experiments/facts.py runs/countries "Peru capital river; Japan currency"

A line of the file is a fact, `subject TAB relation TAB object`, or in a .jsonl file an object with
these three keys. Lines that are empty or begin with # are passed over. Each word is a token of the
agent. Unlike invented facts, these could be learned by heart.

The second command plays one greedy episode of the agent, prints it turn by turn, and then the
answer to each question.
"""
import argparse
import functools
import json
import re
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import INDICES, WORD, WORDS, ComposedQA, score
from experiments.web import KnowledgeBase

LONGEST = len(INDICES)  # objectives
NEEDS = {"demos": "oracle"}


def name_of(text):
    """A name as one word of any script: white space and ASCII punctuation become `_`.

    >>> name_of(" São Tomé & Príncipe "), name_of("东京"), name_of("?")
    ('São_Tomé_Príncipe', '东京', '')
    """
    text = unicodedata.normalize("NFC", text).replace("_", " ")
    return "_".join(re.findall(WORD, text))


@functools.cache
def read_facts(path):
    """The facts of a file, as a KnowledgeBase. A bad line is a ValueError with its number.

    A name is spelled as at its first occurrence, since search and scores ignore case. A fact that
    stands there twice counts once. What has several objects can be found, but is not asked for.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path!r} is not a file; --facts expects a file of facts")
    triples = {}  # a dict, to keep their order
    spelled = {}  # name without case -> name
    text = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").decode(errors="replace")
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if not line.strip() or line.startswith("#"):
            continue
        names = read_line(line, str(path).endswith(".jsonl"))
        if names is None:
            raise ValueError(f"{path}: line {number} is {line[:60]!r}, expected subject, relation "
                             "and object, in UTF-8; fix it")
        triples[tuple(spelled.setdefault(name.casefold(), name) for name in names)] = True
    facts = KnowledgeBase(list(triples))
    if not facts.known:
        raise ValueError(f"{path}: there is no fact to ask for")
    return facts


def read_line(line, is_json):
    """The three names of a line; None if it is not such a line."""
    parts = line.split("\t")
    if is_json:
        try:
            fact = json.loads(line)
            parts = [fact[key] for key in ("subject", "relation", "object")]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    if any(type(part) not in (str, int) for part in parts):  # no null, true or list
        return None
    names = [name_of(str(part)) for part in parts]
    not_utf8 = re.search("[\ud800-\udfff\ufffd]", "".join(names))
    return names if len(names) == 3 and all(names) and not not_utf8 else None


def parse(facts, text):
    """A question in words -> (subject, relations, path). ValueError if the facts don't answer it.

    Names and relations may be several words, in any case: the longest that is known is taken. So
    `new zealand capital` is ("New_Zealand", ["capital"], ...).
    """
    known = {}
    for subject, its_facts in facts.known.items():
        for name in (subject, *its_facts):
            known[name.casefold()] = name
    rest = name_of(text).casefold().split("_")
    found = []
    while rest:
        fits = [n for n in range(1, len(rest) + 1) if "_".join(rest[:n]) in known]
        if not fits:
            raise ValueError(f"`{' '.join(rest)}`: no known name or relation starts here")
        found.append(known["_".join(rest[: fits[-1]])])
        rest = rest[fits[-1] :]
    if len(found) < 2:
        raise ValueError(f"`{text.strip()}`: expected a name and one relation or more")
    return facts.follow(found[0], found[1:])


class FactsQA(ComposedQA):
    """Questions about the facts of a file: `questions` as parse() gives them, else random ones.

    answer  what the agent answered; "" if it did not
    """

    def __init__(self, facts, n_objectives=2, hops=(1, 2), seed=0, questions=None):
        self.facts = facts
        self.questions = questions
        self.answer = ""
        super().__init__(n_objectives, hops, seed)

    def compose(self, indices, hops, kind, names, rng):
        questions = self.questions or self.facts.draw(len(indices), hops, rng)
        return questions, self.facts.index

    def mark(self, text):
        self.answer = text
        return super().mark(text)


def make_env(cfg, n_objectives, seed):
    return FactsQA(read_facts(cfg.facts), n_objectives, cfg.hops, seed)


def extra_words(cfg):
    """The words of the file that are not words of the project already."""
    found = set()
    for fact in read_facts(cfg.facts).index.texts:
        found.update(fact.split())
    return sorted(found - set(WORDS))


# ----------------------------------------------------------------------------------------------
# Questions of your own


def task_of(facts, text):
    """The environment of `name relation ...; name relation ...`."""
    questions = [parse(facts, question) for question in text.split(";") if question.strip()]
    if not 1 <= len(questions) <= LONGEST:
        raise ValueError(f"{len(questions)} questions: expected 1 to {LONGEST}, with `;` between")
    hops = 1, max(len(relations) for _, relations, _ in questions)
    return FactsQA(facts, len(questions), hops, questions=questions)


def report(env):
    """A line for each question of task_of(), after the episode."""
    given = {}
    for index, words in re.findall(rf"(#\d+)((?: {WORD})+)", env.answer):
        given.setdefault(index, words.strip())  # of an index that occurs twice the first counts
    lines = []
    for (index, gold), (subject, relations, _) in zip(env.golds, env.questions):
        line = f"{subject} {' '.join(relations)}: {given.get(index, 'no answer')}"
        right, _ = score(env.answer, [(index, gold)])
        lines.append(line if right else f"{line} (wrong: {gold})")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description="Ask the mem1 agent of a run about its facts.")
    parser.add_argument("run", help="its directory, such as runs/countries")
    parser.add_argument("questions", help='such as "Peru capital river; Japan currency"')
    args = parser.parse_args(argv)

    from eval import show  # here, since train.py imports this module as a world
    from mem1 import POLICIES, rollout
    from train import load_model, load_run

    try:
        cfg, models = load_run(args.run)
        if not cfg.facts or "mem1" not in models:
            raise ValueError(f"{args.run}: expected a finished run with --facts and the agent mem1")
        env = task_of(read_facts(cfg.facts), args.questions)
    except ValueError as problem:
        parser.error(str(problem))
    trajs = rollout(load_model(models["mem1"]), [env], POLICIES["mem1"])
    show(trajs[0], POLICIES["mem1"])
    print("\n".join(report(env)))


if __name__ == "__main__":
    main()
