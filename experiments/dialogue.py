"""dialogue.py: the user changes their mind: adds, corrects and withdraws questions on the way.

    python train.py --env dialogue --demos oracle --around 0 --objectives 1 4 --out runs/dialogue

So what is still to be asked cannot be looked up in the prompt: the state has to hold the past (the
answers) and the future (what the user has said and what has not been dealt with).
"""
import re

import numpy as np

from envs import (INDICES, LIST, STOP, WORD, ComposedQA, asked, current_question, entries,
                  next_question, questions_from, read_prompt)

LONGEST = len(INDICES)  # objectives
NEEDS = {"demos": "oracle", "around": 0}
SAID = rf"user (#\d+) (?:-|:+ (#?{WORD})((?: (?!user ){WORD})+))"  # see said()
ENTRY = rf"(#\d+) (?!user )({WORD})"  # in a list of answers; SAID may follow it


class Dialogue(ComposedQA):
    """N questions, some of them about an earlier answer, and a user who changes some of them.

    What the user says stands after what a search found. Some questions come up on the way, some are
    corrected and some are withdrawn. A question that is withdrawn is right if it is not answered.

    messages  {turn: what the user says then}

    >>> env = Dialogue(4, seed=3)
    >>> env.prompt
    ' #62 :: jelo doctor tenant #63 :: fati rival cousin #64 : #62 pupil #65 : seji guard .'
    >>> env.messages
    {2: ' user #63 -', 1: ' user #65 : seji ally'}
    """

    def __init__(self, n_objectives=2, hops=(1, 2), seed=0):
        max_turns = (hops[1] + 1) * n_objectives + 2
        super().__init__(n_objectives, hops, seed, max_turns, "chain")
        self.width = 2 + hops[1]  # a state holds what was said: `user`, a name, relations
        rng = np.random.default_rng([*np.ravel(seed), 1])
        questions = read_prompt(self.prompt)
        subjects = {subject for _, subject, _, _ in questions}

        # What becomes of each question. The prompt tells the first version of it.
        sections, messages = [], []
        unchanged = 0
        for i, (index, subject, relations, _) in enumerate(questions):
            if i == 0 or index in subjects:  # others build on its answer
                fates = ["stays"]
            elif subject.startswith("#"):
                fates = ["stays", "late"]
            else:
                fates = ["stays", "late", "corrected", "withdrawn"]
            fate = str(rng.choice(fates))
            if fate == "stays":
                unchanged += 1
            elif fate == "withdrawn":
                messages.append(said(index, "", []))
                self.golds[i] = index, ""
                del self.paths[index]
            else:
                messages.append(said(index, subject, relations))
            if fate == "corrected":  # at first it is about something else, if there is such a fact
                facts = [fact.split() for fact in self.index.texts]
                others = [r for s, r, _ in facts if s == subject and r != relations[0]]
                relations = [str(rng.choice(others))] if others else relations
            if fate != "late":
                sections += [index, *asked(subject, relations)]
        self.prompt = " " + " ".join([*sections, STOP])

        # When the user says so: in the first turns, as many as there are questions to ask anyway.
        self.messages = {}
        for message in messages:
            turn = int(rng.integers(1, unchanged + 1))
            self.messages[turn] = f"{self.messages.get(turn, '')} {message}"

    def act(self, text):
        return super().act(text) + self.messages.get(self.turn, "")

    def expert(self, seen, fresh=False):
        """The demonstrator of envs.py, for one who listens.

        Its state goes on with what the user said, in the same words, until that is dealt with:

            jelo doctor milu ; #62 : milu tenant #63 user #65 : seji ally
        """
        questions = read_prompt(self.prompt)
        answers, changes = read_seen(seen)
        query, info = ([("", "")] + re.findall(r"<query>(.*?)<end><info>([^<]*)", seen))[-1]
        pending = still_open(questions, changes, questions[0][0]) or questions
        unsaid = re.sub(f" {SAID}", "", seen)
        index, subject, relations, next_index = current_question(pending, answers, unsaid, query)

        # What did the last search bring to light? One step of the question at hand is done.
        found = []
        if query and relations:
            step = rf"(?<!\S){re.escape(f'{subject} {relations[0]}')} (#?{WORD})"
            match = re.search(step, info)
            if match:
                found = [match[0]]
                subject, relations = match[1], relations[1:]

        # What did the user say just now? The next question may have been withdrawn or put off.
        _, news = read_seen(info)
        if next_index in news:
            rest = [question[0] for question in still_open(questions, changes, next_index)]
            next_index = rest[0] if rest else STOP
        if next_index in changes:
            questions = []  # of the prompt nothing is left: now comes what the user said

        # If the question at hand is answered or was changed, take up the next one.
        new = {}
        last_turn = "left=1 " in info
        if index not in news and (last_turn or not relations):
            answers[index] = new[index] = subject
            changes.pop(index, None)
        if index in news or last_turn or not relations:
            rest = still_open(questions, changes, next_index)
            index, subject, relations, next_index = next_question(rest, answers)
        if last_turn or not relations:  # there is none: answer
            return " ".join([*found, STOP]), "answer", entries(answers)

        # What has to be kept in mind: changes, but no withdrawal of what is behind us.
        ahead = [question[0] for question in questions_from(questions, next_index)]
        kept = []
        for i, (changed_subject, changed_relations) in changes.items():
            if i != index and (changed_subject or i in ahead) and not fresh:
                kept.append(said(i, changed_subject, changed_relations))
        memory = entries(new if fresh else answers)
        state = [*found, LIST, memory, index, *asked(subject, relations), next_index, *kept]
        return " ".join(filter(None, state)), "query", f"{subject} {relations[0]}"


def said(index, subject, relations):
    """How the user changes a question, and how a state keeps that in mind.

    >>> said("#65", "seji", ["ally"]), said("#63", "", [])
    ('user #65 : seji ally', 'user #63 -')
    """
    return " ".join(["user", index, *(asked(subject, relations) if subject else ["-"])])


def read_seen(seen):
    """What stands in a context: ({index: answer}, {index: (subject, relations) as changed}).

    Of each index the last mention counts. A question without a subject is withdrawn.

    >>> read_seen("; #64 jero #65 : milu heir . user #66 -<query> milu heir")
    ({'#64': 'jero'}, {'#66': ('', [])})
    """
    answers, changes = {}, {}
    for changed, subject, relations, index, answer in re.findall(f"{SAID}|{ENTRY}", seen):
        answers.pop(changed or index, None)
        changes.pop(changed or index, None)
        if changed:
            changes[changed] = subject, relations.split()
        else:
            answers[index] = answer
    return answers, changes


def still_open(questions, changes, next_index):
    """The questions of the prompt from `then` on, then those that the user has changed or added."""
    rest = []
    for index, subject, relations, _ in questions_from(questions, next_index):
        if index not in changes:
            rest.append((index, subject, relations))
    for index, (subject, relations) in changes.items():
        if subject:
            rest.append((index, subject, relations))
    following = [index for index, _, _ in rest[1:]] + [STOP]
    return [(*question, next_index) for question, next_index in zip(rest, following)]


def make_env(cfg, n_objectives, seed):
    return Dialogue(n_objectives, cfg.hops, seed)


def extra_words(cfg):
    return ["user", "-"]
