"""cue.py: the smallest task in which memory pays, learned within a minute on one core.

    python train.py --preset debug

Every search shows one word, and all are due at the end. So each has to be noted down before the
next one replaces it in view. The demonstrator's episode (- pruned, = read, + written):

    >>> from eval import show
    >>> from mem1 import expert_rollout, keep_last
    >>> show(expert_rollout(World(2, seed=[1]), keep_last))
    task   <task> .
    turn 1
         + <IS><query><end>
    turn 2
         = <IS><query><end><info> left=3 #0 rival
         + <IS> #0 rival<query><end>
    turn 3
         - <IS><query><end><info> left=3 #0 rival
         = <IS> #0 rival<query><end><info> left=2 #1 mentor .
         + <IS> .<answer> #0 rival #1 mentor<end>
           answered; the right answer is #0 rival #1 mentor: em 2/2, peak 20 tokens
    <BLANKLINE>
"""
import numpy as np

from envs import INDICES, RELATIONS, STOP, Env, entries, read_answers

CUES = RELATIONS[:4]


class World(Env):
    """N words, shown one by one."""

    needs = {"around": 0}

    def __init__(self, n_objectives, hops=(1, 2), seed=0):
        super().__init__(n_objectives, n_objectives + 2)
        cues = np.random.default_rng(seed).choice(CUES, n_objectives)
        self.golds = list(zip(INDICES, map(str, cues)))
        self.prompt = " ."

    def act(self, text):
        shown = [" ".join(pair) for pair in self.golds]
        shown[-1] += f" {STOP}"
        return shown[self.turn - 1] if self.turn <= len(shown) else "nothing found"

    def answers_shown(self, query, info):
        return set(read_answers(info).items())

    def expert(self, seen, fresh=False):
        """The demonstrator: its state lists all words so far, or just the new one."""
        answers = read_answers(seen)
        if "answer now" in seen or seen.endswith(STOP):
            return STOP, "answer", entries(answers)
        noted = dict([*answers.items()][-1:]) if fresh else answers
        return entries(noted), "query", ""

    def random_notes(self, seen, rng):
        """Like expert(), but each new note is one of the four words at random."""
        state, kind, text = self.expert(seen)
        if state and kind == "query":
            *words, _ = state.split()
            state = " ".join([*words, str(rng.choice(CUES))])
        return state, kind, text
