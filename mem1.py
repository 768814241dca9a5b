"""mem1.py: an agent that works through long tasks in constant memory (MEM1, arXiv 2506.15841).

Most agents append every turn to their context. A MEM1 agent rewrites one compact internal state,
<IS>, at every turn. Of the past, the next turn sees only that state, the last query and its result:

    turn 1   prompt                                  <IS> a <query> q <end>
    turn 2   prompt  <IS> a <query> q <end> <info> i  <IS> b <query> r <end>
    turn 3   prompt  <IS> b <query> r <end> <info> j  <IS> c <answer> ... <end>
             ------  ------------------------------  -------------------------
             kept    kept from the last turn:        written now: in the loss, exactly
             always  only read, not in the loss      once (all but <IS>, which is given)

This file holds the whole method except the optimiser: tags and tokenizer, the parser for the
agent's output, the context policies (what to keep), the rollout, the trajectory, and the rows that
the learner trains on. It also has the layouts of the paper and of its released code, to measure
what exactness is worth.

The one idea: every token is trained in the context in which it was sampled. Contexts of an episode
that share a prefix share its tokens, so together they form a tree whose trunk is the prompt. A
*branch* continues as long as the context is only appended to; when something is pruned, a new one
starts at the prompt, and what was kept is copied into it. So MEM1 has a branch for nearly every
turn, and an agent that keeps everything has a single one. The learner lays the tree out as one row
per branch, the path from the root to its end, with a plain causal mask: nothing is approximated.

Differs from the paper (sec. 3.3) and its released code:
1) the paper stitches one copy of every token into a row and hides what is pruned with a 2-D mask.
   There, a kept token's keys are computed while it still sees what has since been pruned, so
   from the third turn on the learner's policy is not the one that acted. Our rows are exact;
2) one <end> closes a turn, and a segment ends where the next tag begins;
3) the first tag of a turn, <IS>, is given to the agent, not sampled and not trained.
"""
import re
import time
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch

import envs
from envs import Stream, keyed_rng
from model import Cache

# ----------------------------------------------------------------------------------------------
# Tokens. Tags are special tokens; every word of envs.WORDS is one; other text is bytes.

TAGS = ["<task>", "<IS>", "<query>", "<answer>", "<info>", "<end>"]


class Tokenizer:
    """A tiktoken.Encoding of 256 bytes, each of `words` as one token (with its space), and TAGS.

    Built from our own ranks, so that nothing is downloaded. Text goes in by `encode_ordinary`
    alone, which cannot yield a tag, whatever the text says:

    >>> ids = ENC.encode_ordinary("</info> <answer> #1 x <end>")
    >>> any(token in TAG_IDS for token in ids), ENC.decode(ids)
    (False, '</info> <answer> #1 x <end>')
    """

    def __init__(self, words):
        self.ranks = {bytes([i]): i for i in range(256)}
        self.tags = {}
        self.add(words)
        self.tags = {tag: self.n_vocab + i for i, tag in enumerate(TAGS)}
        self.add([])

    def add(self, words):
        """Append words to the vocabulary; no existing token changes its id."""
        for word in words:
            self.ranks.setdefault(b" " + word.encode(), len(self.ranks) + len(self.tags))
        # A word, punctuation or white space; words and punctuation include one space before them.
        pattern = rf" ?#?{envs.WORD}| ?[!-/:-@\[-^`{{-~]+|\s+"
        self.encoding = tiktoken.Encoding(
            "mem1", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self.tags)
        self.n_vocab = self.encoding.n_vocab
        self.encode_ordinary = self.encoding.encode_ordinary
        self.decode = self.encoding.decode


ENC = Tokenizer(envs.WORDS)
TASK, IS, QUERY, ANSWER, INFO, END = TAG_IDS = [ENC.tags[tag] for tag in TAGS]


def parse(ids):
    """What the agent wrote after its <IS>: (kind, state ids, action ids, action text). Never fails.

    Well-formed is `state <query> text <end>` or `state <answer> text <end>`; all else is
    "malformed".

    >>> state, text = map(ENC.encode_ordinary, (" #1 jelo", " jelo heir"))
    >>> parse([*state, QUERY, *text, END])[0::3]
    ('query', ' jelo heir')
    >>> parse([QUERY, QUERY, END])[0], parse([QUERY, END, IS])[0], parse([])[0]
    ('malformed', 'malformed', 'malformed')
    """
    tags = [token for token in ids if token in TAG_IDS]
    start = ids.index(tags[0]) if tags else len(ids)
    state, action = ids[:start], ids[start:]
    text = ENC.decode([token for token in action if token not in TAG_IDS])  # broken UTF-8: U+FFFD
    kind = {(QUERY, END): "query", (ANSWER, END): "answer"}.get(tuple(tags), "malformed")
    if ids[-1:] != [END]:
        kind = "malformed"
    return kind, state, action, text


# ----------------------------------------------------------------------------------------------
# The trajectory


@dataclass
class Turn:
    """One exchange with the environment, as token ids; the three parts follow each other."""
    state: list  # <IS> ...
    action: list  # <query> ... <end>, or <answer> ... <end>
    info: list  # <info> ...; empty after the last turn

    @property
    def written(self):
        """What the agent wrote: all but <IS>, which was given."""
        return self.state[1:] + self.action


@dataclass
class Branch:
    """What follows the prompt in one row of the learner. Parallel lists, one entry per token."""
    ids: list = field(default_factory=list)
    loss_mask: list = field(default_factory=list)  # True where the agent chose the token, here
    logp: list = field(default_factory=list)  # as sampled; 0 where not trained
    value: list = field(default_factory=list)  # at the position that predicts the token; 0 likewise
    attn_mask: object = None  # (P + n, P + n) bool, for layouts that are not exact; None: causal

    def extend(self, ids, loss_mask, logp=None, value=None):
        self.ids += ids
        self.loss_mask += [loss_mask] * len(ids)
        self.logp += logp or [0.0] * len(ids)
        self.value += value or [0.0] * len(ids)


@dataclass
class Trajectory:
    """An episode: the prompt, the branches that grow from it, and its environment."""
    env: object
    prompt: list  # what every turn sees: see prompt_ids()
    branches: list = field(default_factory=list)
    turns: list = field(default_factory=list)
    cached: int = 0  # tokens of the last branch that are in the sampler's cache
    spans: list = field(default_factory=list)  # (seen, wrote) per turn: tokens, prompt not counted
    seconds: float = 0.0  # wall time of its batch, divided by the episodes in it
    kv_bytes: int = 0  # key-value memory allocated for it

    def open_turn(self, policy):
        """Put into context what the agent sees before it writes. True if it is a new branch."""
        context = [*recall(self.env, policy, self.turns), IS]
        last = self.branches[-1].ids if self.branches else None
        new_branch = last is None or context[: len(last)] != last
        if new_branch:
            self.branches.append(Branch())
        branch = self.branches[-1]
        branch.extend(context[len(branch.ids) :], loss_mask=False)
        return new_branch

    def close_turn(self, ids, logp=None, value=None):
        """Record what the agent wrote, then step the environment."""
        branch = self.branches[-1]
        self.spans.append((len(branch.ids), len(ids)))
        branch.extend(ids, loss_mask=True, logp=logp, value=value)
        self.cached = len(branch.ids) - 1  # the sampler has not fed back the last token
        kind, state, action, text = parse(ids)
        observation = self.env.step(kind, text)
        info = [] if self.env.done else [INFO, *ENC.encode_ordinary(observation)]
        self.turns.append(Turn([IS, *state], action, info))

    @property
    def reward(self):
        """Share of the objectives answered exactly: the paper's EM count, scaled to 0..1."""
        return self.env.em / self.env.n_objectives

    @property
    def peak(self):
        """Most tokens in context over the turns, prompt not counted (MEM1 app. A.4)."""
        return max((seen + wrote for seen, wrote in self.spans), default=0)

    @property
    def dependency(self):
        """The tokens in context before each written token, summed (MEM1 app. A.4): over the turns,
        the sum of seen + i + 1/2 for i in 0..wrote-1."""
        return sum((seen + wrote / 2) * wrote for seen, wrote in self.spans)

    @property
    def n_trained(self):
        """Tokens that the agent chose."""
        return sum(sum(branch.loss_mask) for branch in self.branches)


def remembered(traj):
    """Which answers the agent found and its state holds: [(turn, found, held), ...], one per query.

    found  answers {(index, answer), ...} that it has asked for and been shown before this turn
    held   those of them that stand in its state (an agent that keeps older states need not repeat
           them)
    """
    found, rows = set(), []
    for t, turn in enumerate(traj.turns):
        kind, _, _, query = parse(turn.written)
        if kind == "query":
            entries = set(re.findall(envs.ENTRY, ENC.decode(turn.state)))
            rows.append((t, set(found), found & entries))
        found |= envs.answers_shown(traj.env.paths, query, ENC.decode(turn.info))
    return rows


def tree(traj):
    """All tokens of a trajectory, the prompt's, then each branch's: (ids, parent, loss_mask).

    parent[i] is the token right before i in its context, -1 for the first. All else follows from
    it: i's context is the path from the root to i, and it is predicted at parent[i].

    >>> ids, parent, loss_mask = tree(sketch(keep_last, turns=3))
    >>> parent
    [-1, 0, 1, 2, 3, 4, 0, 6, 7, 8, 9]
    """
    n = len(traj.prompt)
    ids = list(traj.prompt)
    parent = list(range(-1, n - 1))
    loss_mask = [False] * n
    for branch in traj.branches:
        parent += [n - 1, *range(len(ids), len(ids) + len(branch.ids) - 1)]
        ids += branch.ids
        loss_mask += branch.loss_mask
    return ids, parent, loss_mask


def attention_mask(traj):
    """Who sees whom (n, n), bool. A token sees its parent, what that sees, and itself.

    Three turns of MEM1, tags only: Task, then State, Query, Info for each turn; `*` is trained.

    >>> print(picture(sketch(keep_last, turns=3)))
      T S Q I S Q S Q I S Q
    T 1 . . . . . . . . . .
    S 1 1 . . . . . . . . .
    Q 1 1 1 . . . . . . . . *
    I 1 1 1 1 . . . . . . .
    S 1 1 1 1 1 . . . . . .
    Q 1 1 1 1 1 1 . . . . . *
    S 1 . . . . . 1 . . . .
    Q 1 . . . . . 1 1 . . .
    I 1 . . . . . 1 1 1 . .
    S 1 . . . . . 1 1 1 1 .
    Q 1 . . . . . 1 1 1 1 1 *

    The first two turns share a branch, since nothing is pruned yet. Then the first turn is dropped,
    and the second is re-read in a new branch, where it is not trained a second time.
    """
    ids, parent, _ = tree(traj)
    if traj.branches and traj.branches[0].attn_mask is not None:  # a layout that is not a tree
        return traj.branches[0].attn_mask
    see = np.eye(len(ids), dtype=bool)
    for i in range(1, len(ids)):
        see[i] |= see[parent[i]]
    return see


def picture(traj):
    """attention_mask() as text, one row per token."""
    ids, _, loss_mask = tree(traj)
    names = ["TSQAIE"[TAG_IDS.index(token)] if token in TAG_IDS else "-" for token in ids]
    lines = ["  " + " ".join(names)]
    for name, row, trained in zip(names, attention_mask(traj), loss_mask):
        cells = ["1" if x else "." for x in row]
        lines.append(" ".join([name, *cells] + (["*"] if trained else [])))
    return "\n".join(lines)


def sketch(policy, turns):
    """The smallest trajectory of `turns` turns: state, query and info are one token each."""
    env = SimpleNamespace(step=lambda kind, text: "", done=False, history=[])
    traj = Trajectory(env, [TASK])
    for t in range(turns):
        env.done = t == turns - 1
        traj.open_turn(policy)
        traj.close_turn([QUERY])
    return traj


# ----------------------------------------------------------------------------------------------
# Context policies: which tokens of the turns so far the next turn sees. It always sees the prompt.


def keep_last(turns):
    """MEM1 (sec. 3.1): the last internal state, query and info, and nothing else."""
    last = turns[-1]
    return last.state + last.action + last.info


def keep_all(turns):
    """The agent whose context grows with every turn (ReAct, Search-R1). One branch, a causal mask.

    >>> print(picture(sketch(keep_all, turns=3)))
      T S Q I S Q I S Q
    T 1 . . . . . . . .
    S 1 1 . . . . . . .
    Q 1 1 1 . . . . . . *
    I 1 1 1 1 . . . . .
    S 1 1 1 1 1 . . . .
    Q 1 1 1 1 1 1 . . . *
    I 1 1 1 1 1 1 1 . .
    S 1 1 1 1 1 1 1 1 .
    Q 1 1 1 1 1 1 1 1 1 *
    """
    return [token for turn in turns for token in turn.state + turn.action + turn.info]


def keep_all_relist(turns):
    """Full context, too. But where the demonstrator's state holds only the new answer with keep_all,
    since the others are still in view, here it repeats the whole list, as with keep_last: what does
    MEM1 owe to rewriting its state, and what to pruning the rest?"""
    return keep_all(turns)


def keep_window(turns):
    """The last three turns: a truncated history."""
    return keep_all(turns[-3:])


def keep_similar(turns):
    """The last turn and the two earlier ones that share most words with its query; ties go to the
    later. An external memory with retrieval (after A-MEM, arXiv 2502.12110; MEM1 app. A.4)."""
    *earlier, last = turns

    def overlap(t):
        turn = earlier[t]
        return len(set(last.action) & set(turn.state + turn.action + turn.info)), t

    nearest = sorted(range(len(earlier)), key=overlap)[-2:]
    return keep_all([earlier[t] for t in sorted(nearest)] + [last])


def keep_info(turns):
    """The last query and info without the state: what can be done with no memory at all."""
    return turns[-1].action + turns[-1].info


POLICIES = {"mem1": keep_last, "full": keep_all, "full-list": keep_all_relist,
            "window": keep_window, "similar": keep_similar, "amnesic": keep_info}


def recall(env, policy, turns):
    """What the next turn sees of the past, as ids."""
    turns = env.history + turns
    return policy(turns) if turns else []


# ----------------------------------------------------------------------------------------------
# What to imitate


def prompt_ids(env):
    """What every turn sees: the task after its tag."""
    return [TASK, *ENC.encode_ordinary(env.prompt)]


def expert(env, policy, turns, rng=None):
    """What the demonstrator would write after `turns`, as ids. It sees what `policy` keeps.

    rng: None for oracle notes; a numpy Generator for random ones.
    """
    seen = ENC.decode(recall(env, policy, turns))
    if rng is None:  # with keep_all, older answers stay in view: no need to list them again
        state, kind, text = env.expert(seen, fresh=policy is keep_all)
    else:
        state, kind, text = env.random_notes(seen, rng)
    ids = ENC.encode_ordinary(" " + state if state else "")
    ids.append(QUERY if kind == "query" else ANSWER)
    return ids + ENC.encode_ordinary(" " + text if text else "") + [END]


def demonstrate(env, policy, rng=None):
    """An episode played by the scripted demonstrator, as a trajectory to imitate."""
    traj = Trajectory(env, prompt_ids(env))
    while not env.done:
        traj.open_turn(policy)
        traj.close_turn(expert(env, policy, traj.turns, rng))
    return traj


def play_history(env, policy, first, rng=None):
    """Let the demonstrator answer the questions before number `first`, under this context policy and
    with its own kind of notes. What it does stands in env.history: turns as any others.

    The turn that takes up question `first` is the agent's: it sees what it would see at this point
    if it had to answer all questions. (Should the turns run out before, it begins with the last.)
    """
    start = envs.read_prompt(env.prompt)[first][0]
    while True:
        kind, state, action, text = parse(expert(env, policy, [], rng))
        taken_up = re.findall(envs.OPEN, ENC.decode(state))
        if kind == "answer" or taken_up[-1][0] == start:
            return
        info = [INFO, *ENC.encode_ordinary(env.step(kind, text))]
        env.history.append(Turn([IS, *state], action, info))


def exercise(cfg, step, i, longest):
    """One reading exercise, as a trajectory of one branch in which the answers are trained."""
    more = [*envs.extra_words(cfg), *envs.ALL_NAMES[len(envs.NAMES) : cfg.names]]
    rng = keyed_rng(cfg.seed, Stream.PRIMER, step, i)
    text, answer = envs.primer(rng, longest, more)
    branch = Branch()
    for part, learn in answer:
        branch.extend(ENC.encode_ordinary(part), loss_mask=learn)
    return Trajectory(None, ENC.encode_ordinary(text), [branch])


# ----------------------------------------------------------------------------------------------
# Acting


def turn_cap(env):
    """Most tokens that an agent may write in a turn: index and name for each question, plus room for
    the rest."""
    return (1 + env.width) * env.n_questions + 8 * (2 + env.width)


def rollout(model, environments, policy, rngs=None, batch=64):
    """Play all `environments`, each to its end. Returns their trajectories, in order.

    batch: how many are played side by side, which bounds the memory of an agent that keeps all.

    rngs: one numpy Generator per episode, so that an episode is the same whatever runs beside it.
    None: greedy, always the likeliest token.
    """
    trajs = [Trajectory(env, prompt_ids(env)) for env in environments]
    order = sorted(range(len(trajs)), key=lambda e: len(trajs[e].prompt))  # little padding
    for i in range(0, len(order), batch):
        some = order[i : i + batch]
        play_out(model, [trajs[e] for e in some], policy, rngs and [rngs[e] for e in some])
    return trajs


@torch.no_grad()
def play_out(model, trajs, policy, rngs):
    """Play some trajectories side by side, from their first turn to their last."""
    weight = model.emb.weight
    started = time.perf_counter()
    cache = Cache(model, len(trajs))
    feed(model, cache, [traj.prompt for traj in trajs])  # encoded once an episode
    cache.keep_prompt()
    live = list(range(len(trajs)))  # live[b]: the episode in row b of the cache
    while live:
        # 1. Bring each context up to date. A new branch starts at the prompt: the rest
        # is forgotten, and what was kept is fed in again.
        new_branch = [trajs[e].open_turn(policy) for e in live]
        cache.rollback(torch.tensor(new_branch, device=weight.device))
        starts = [0 if new else trajs[e].cached for e, new in zip(live, new_branch)]
        pending = [trajs[e].branches[-1].ids[start:] for e, start in zip(live, starts)]
        hidden = feed(model, cache, pending)  # (B, C)

        # 2. Every episode writes a turn, and draws as many numbers as its own cap, used or not.
        caps = [turn_cap(trajs[e].env) for e in live]
        uniform = None
        if rngs is not None:
            draws = np.zeros((len(live), max(caps)))
            for b, e in enumerate(live):
                draws[b, : caps[b]] = 1 - rngs[e].random(caps[b])  # in (0, 1]
            uniform = torch.tensor(draws, device=weight.device, dtype=weight.dtype)  # (B, max cap)
        written, order = write(model, cache, hidden, caps, uniform)

        # 3. The environments respond; finished episodes leave the batch.
        for e, turn in zip(live, written):
            trajs[e].close_turn(*turn)
        live = [live[b] for b in order]
        going = torch.tensor([not trajs[e].env.done for e in live], device=weight.device)
        order = cache.compact(going).tolist()  # cache.B is now the number of those still going
        live = [live[b] for b in order[: cache.B]]
    for traj in trajs:
        traj.seconds = (time.perf_counter() - started) / len(trajs)
        traj.kv_bytes = cache.bytes // len(trajs)


def feed(model, cache, contexts):
    """Append a list of ids to each row of the cache; returns the hidden state after each (B, C)."""
    device = model.emb.weight.device
    T = max(map(len, contexts))
    n = torch.tensor([len(context) for context in contexts], device=device)  # (B,)
    ids = torch.tensor([c + [0] * (T - len(c)) for c in contexts], device=device)  # (B, T)
    cache.reserve(T, n)
    x = model.forward(ids, cache)  # (B, T, C); uncompiled despite --compile
    return x[torch.arange(len(contexts), device=device), n - 1]  # (B, C)


def write(model, cache, hidden, caps, uniform):
    """One turn of every row: sample until <end>, or until the row's cap.

    hidden (B, C) predicts the first token; uniform (B, max cap) as in sample(). Returns what each
    row wrote [(ids, logp, value), ...], and `order`, since finished rows are moved to the back: row
    b of the cache now holds what was in row order[b].
    """
    B, device = len(caps), hidden.device
    cap = torch.tensor(caps, device=device)  # (B,)
    ids = torch.zeros(B, max(caps), device=device, dtype=torch.long)  # (B, max cap)
    logp = torch.zeros_like(ids, dtype=hidden.dtype)  # (B, max cap)
    value = torch.zeros_like(logp)  # (B, max cap)
    length = torch.zeros_like(cap)  # (B,) tokens written
    order = torch.arange(B, device=device)  # (B,)
    writing = torch.ones_like(order, dtype=torch.bool)  # (cache.B,), like all below
    for t in range(max(caps)):
        row = order[: cache.B]
        drawn = None if uniform is None else uniform[row, t]
        ids[row, t], logp[row, t] = sample(model.logits(hidden), drawn)
        value[row, t] = model.value(hidden)
        length[row] += writing
        writing &= (ids[row, t] != END) & (t + 1 < cap[row])
        n_writing = int(writing.sum())  # the one device sync per token
        if n_writing == 0:
            break
        if n_writing <= 0.75 * cache.B:  # without this, evaluation took up to 1.8 times as long
            moved = cache.compact(writing)
            order[: len(moved)] = row[moved]
            writing = torch.ones(n_writing, device=device, dtype=torch.bool)
        # Finished rows that are still in the batch become padding: their tokens take no slot.
        cache.reserve(1, writing.long())
        hidden = model.forward(ids[order[: cache.B], t, None], cache)[:, 0]  # (cache.B, C)
    cache.B = B
    columns = zip(ids.tolist(), logp.tolist(), value.tolist(), length.tolist())
    return [(i[:n], lp[:n], v[:n]) for i, lp, v, n in columns], order.tolist()


def sample(logits, uniform=None):
    """One token per row, by inverse transform: logits (B, V) -> ids, logp (B,).

    uniform (B,) in (0, 1]: one number per token, drawn by the episode's own generator, so that what
    it samples does not depend on the rows beside it. Temperature 1 and no filtering: the
    distribution sampled from is the one that is trained. None: greedy.
    """
    logps = logits.log_softmax(-1)  # (B, V)
    if uniform is None:
        ids = logps.argmax(-1)
    else:
        cdf = logps.exp().cumsum(-1)  # (B, V)
        ids = (cdf < uniform[:, None] * cdf[:, -1:]).sum(-1)
    return ids, logps.gather(-1, ids[:, None]).squeeze(-1)


# ----------------------------------------------------------------------------------------------
# Learning: trajectories as the learner sees them


@dataclass
class Rows:
    """Some branches, each as one row: the prompt, then the branch, right-padded.

    >>> (rows,) = make_rows([sketch(keep_last, turns=3)])  # T SQISQ, T SQISQ
    >>> rows.loss_mask.int()
    tensor([[0, 0, 1, 0, 0, 1],
            [0, 0, 0, 0, 0, 1]], dtype=torch.int32)
    >>> rows.index  # the agent wrote three tokens: two in the first row, one in the second
    tensor([0, 1, 2])
    """
    ids: torch.Tensor  # (B, T)
    loss_mask: torch.Tensor  # (B, T) bool: True where the agent chose the token, in this row
    index: torch.Tensor  # (m,) place of each trained token among all M of the trajectories
    attn_mask: object = None  # (B, 1, T, T) bool; None: causal

    def to(self, device):
        tensors = vars(self).values()
        return Rows(*(None if x is None else x.to(device) for x in tensors))


def make_rows(trajs, budget=8192, which=None):
    """Trajectories as a list of Rows of at most `budget` tokens (or one row), padding included.

    which: only these trajectories; `index` still counts the trained tokens of all. Every trained
    token is in exactly one of the Rows. With nothing to train there is one row without loss, so
    that a process with no work still joins the all-reduce of DDP.
    """
    lines, offset = [], 0
    for i, traj in enumerate(trajs):
        for branch in traj.branches:
            if which is None or i in which:
                lines.append((len(traj.prompt) + len(branch.ids), traj, branch, offset))
            offset += sum(branch.loss_mask)
    lines.sort(key=lambda line: -line[0])  # rows of like length side by side: little padding
    chunks = []
    for line in lines:
        if not chunks or (len(chunks[-1]) + 1) * chunks[-1][0][0] > budget:
            chunks.append([])
        chunks[-1].append(line)
    nothing = [(1, Trajectory(None, []), Branch([IS], [False]), 0)]
    return [collate(chunk) for chunk in chunks or [nothing]]


def collate(chunk):
    """Lines [(length, trajectory, branch, place of its first trained token), ...] as Rows."""
    B, T = len(chunk), chunk[0][0]
    ids = np.zeros((B, T), dtype=np.int64)
    loss_mask = np.zeros((B, T), dtype=bool)
    index = []
    attn_mask = None  # causal
    for b, (n, traj, branch, offset) in enumerate(chunk):
        ids[b, :n] = traj.prompt + branch.ids
        loss_mask[b, len(traj.prompt) : n] = branch.loss_mask
        index.append(offset + np.arange(sum(branch.loss_mask)))
        if branch.attn_mask is not None:
            if attn_mask is None:
                attn_mask = torch.ones(B, 1, T, T, dtype=torch.bool).tril()  # (B, 1, T, T)
            attn_mask[b, 0, :n, :n] = torch.from_numpy(branch.attn_mask)
    tensors = map(torch.from_numpy, (ids, loss_mask, np.concatenate(index)))
    return Rows(*tensors, attn_mask)


def recorded(trajs, name):
    """What the sampler recorded ("logp" or "value") for all trained tokens, flat (M,), one episode
    after another, in sampling order."""
    flat = []
    for traj in trajs:
        for branch in traj.branches:
            flat += [x for x, trained in zip(getattr(branch, name), branch.loss_mask) if trained]
    return flat


def predict(model, rows):
    """The learner's view of Rows: logp, value, entropy (m,) of the trained tokens, with gradients.

    In the exact layout every token has the context in which it was sampled, and the forward pass is
    the sampler's, so logp equals what was recorded, up to rounding. The value's gradient stops at
    its own head: the critic reads the actor's hidden states without changing them.
    """
    raw = getattr(model, "module", model)  # without its DDP wrapper
    x = model(rows.ids, mask=rows.attn_mask)  # (B, T, C)
    trained = rows.loss_mask[:, 1:]  # (B, T-1): the row at t predicts ids[t+1]
    x, target = x[:, :-1][trained], rows.ids[:, 1:][trained]  # (m, C), (m,)
    logps = raw.logits(x).log_softmax(-1)  # (m, V)
    logp = logps.gather(-1, target[:, None]).squeeze(-1)  # (m,)
    return logp, raw.value(x.detach()), -(logps.exp() * logps).sum(-1)


# ----------------------------------------------------------------------------------------------
# Two inexact layouts of a MEM1 trajectory, to measure what they cost


def stitched(traj, released=False):
    """The paper's layout (sec. 3.3, app. A.7): each token once, under a 2-D mask of what it saw.

    >>> print(picture(stitched(sketch(keep_last, turns=3))))
      T S Q I S Q I S Q
    T 1 . . . . . . . .
    S 1 1 . . . . . . .
    Q 1 1 1 . . . . . . *
    I 1 1 1 1 . . . . .
    S 1 1 1 1 1 . . . .
    Q 1 1 1 1 1 1 . . . *
    I 1 1 1 1 1 1 1 . .
    S 1 . . . 1 1 1 1 .
    Q 1 . . . 1 1 1 1 1 *

    From turn 3 on this is not the policy that acted. Turn 3 reads keys of turn 2 that were computed
    while turn 2 still saw turn 1, so from the second layer on they leak it (at a turn boundary the
    convolution does so in the first). And what is kept stands farther from what is written now.

    released: the layout of the paper's published code. It also hides the previous state, which the
    agent did see, and an <info> sees nothing but itself.

    >>> print(picture(stitched(sketch(keep_last, turns=3), released=True)))
      T S Q I S Q I S Q
    T 1 . . . . . . . .
    S 1 1 . . . . . . .
    Q 1 1 1 . . . . . . *
    I . . . 1 . . . . .
    S 1 . 1 1 1 . . . .
    Q 1 . 1 1 1 1 . . . *
    I . . . . . . 1 . .
    S 1 . . . . 1 1 1 .
    Q 1 . . . . 1 1 1 1 *
    """
    branch = Branch()
    turn, part = [-1] * len(traj.prompt), ["prompt"] * len(traj.prompt)
    history = traj.env.history
    for t, this in enumerate(history + traj.turns):
        branch.extend(this.state[:1], loss_mask=False)  # its <IS> is given
        branch.extend(this.written, loss_mask=t >= len(history))
        branch.extend(this.info, loss_mask=False)
        for name, ids in vars(this).items():  # state, action, info
            turn += [t] * len(ids)
            part += [name] * len(ids)
    turn, part = np.array(turn), np.array(part)
    ago = turn[:, None] - turn  # turns between the reader and what it reads
    see = np.tri(len(turn), dtype=bool) & ((part == "prompt") | (ago <= 1))
    if released:
        see &= (ago == 0) | (part != "state")
        see &= (part[:, None] != "info") | ((ago == 0) & (part == "info"))
    branch.attn_mask = see
    return replace(traj, branches=[branch])


LAYOUTS = {"tree": lambda traj: traj,  # what was sampled, unchanged
           "stitched": stitched, "released": partial(stitched, released=True)}
