"""mem1.py: an agent that works through long tasks in constant memory (MEM1, arXiv 2506.15841).

Most agents append every turn to their context. A MEM1 agent rewrites one compact internal state, <IS>,
at every turn, and the next turn sees nothing else of the past:

    turn 1   task                                  <IS> a <query> q <end>
    turn 2   task  <IS> a <query> q <end> <info> i  <IS> b <query> r <end>
    turn 3   task  <IS> b <query> r <end> <info> j  <IS> c <answer> ... <end>
             ----  ------------------------------  -------------------------
             kept  kept of the last turn: it is    written now: sampled, and
             read again, and not trained           trained, exactly once

This file holds the whole method but the optimiser: the tags and the tokenizer, the parser of what the
agent wrote, the context policies (what to keep), the rollout, and the trajectory as the learner sees it; also the
layouts of the paper and of its released code, to measure what exactness is worth.

The one idea. Contexts of an episode that share a beginning share tokens, so together they are a tree:
a token's context is its path to the root. Here the tree is a trunk, the task, and *branches*. A branch
goes on for as long as contexts are only appended to; when something is pruned, a new one starts at the
trunk, and what was kept is copied into it. So MEM1 has a branch for nearly every turn, and an agent that
keeps everything has a single one. From the tree follows all that training needs, and nothing is
approximated: a token attends to its ancestors, its position is its depth, and it is predicted by the
row of its parent, in the very context in which it was sampled.

Differs from the paper (sec. 3.3) and its released code:
1) the paper stitches one copy of every token and hides what is pruned by a 2-D attention mask. There, the keys
   of a kept token are computed while it still sees what has since been pruned, so that from the third turn on
   the learner's policy is not the one that acted. The tree is exact, and needs no mask of that kind;
2) one <end> closes a turn, and a segment ends where the next tag begins;
3) the first tag of a turn, <IS>, is given to the agent, not sampled and not trained.
"""
import time
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch

import envs
from model import WIDTH, Cache, Tree

# ----------------------------------------------------------------------------------------------
# Tokens. Tags are special tokens; every word of the world is one token; other text is bytes.

TAGS = ["<task>", "<IS>", "<query>", "<answer>", "<info>", "<end>"]


class Vocabulary:
    """A tiktoken.Encoding of 256 bytes, each of `words` as a single token (with its leading space), and TAGS.

    Built from our own ranks, so that nothing is downloaded. Text goes in by `encode_ordinary` alone,
    which cannot yield a tag, whatever the text says:

    >>> tags = ENC.encode_ordinary("</info> <answer> #1 x <end>")
    >>> any(token in TAG_IDS for token in tags), ENC.decode(tags)
    (False, '</info> <answer> #1 x <end>')
    """

    def __init__(self, words):
        self.ranks, self.tags = {bytes([i]): i for i in range(256)}, {}
        self.add(words)
        self.tags = {tag: self.n_vocab + i for i, tag in enumerate(TAGS)}
        self.add([])

    def add(self, words):
        """More words, behind all that there is: no token changes its id. A word that is known already stays as it is."""
        for word in words:
            self.ranks.setdefault(b" " + word.encode(), len(self.ranks) + len(self.tags))
        # a word, punctuation or white space; words and punctuation take one space before them along
        pattern = rf" ?#?{envs.WORD}| ?[!-/:-@\[-^`{{-~]+|\s+"
        encoding = tiktoken.Encoding("mem1", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self.tags)
        self.encoding, self.n_vocab = encoding, encoding.n_vocab
        self.encode_ordinary, self.decode = encoding.encode_ordinary, encoding.decode


ENC = Vocabulary(envs.WORDS)
TASK, IS, QUERY, ANSWER, INFO, END = TAG_IDS = [ENC.tags[tag] for tag in TAGS]
(SPLIT,) = ENC.encode_ordinary(" " + envs.LIST)


def parse(ids):
    """What the agent wrote after its <IS>: (kind, state ids, action ids, action text). Never fails.

    Well-formed is `state <query> text <end>` or `state <answer> text <end>`. All else is "malformed".

    >>> parse([*ENC.encode_ordinary(" #1 jelo"), QUERY, *ENC.encode_ordinary(" jelo heir"), END])[0::3]
    ('query', ' jelo heir')
    >>> parse([QUERY, QUERY, END])[0], parse([IS, END])[0], parse([])[0]
    ('malformed', 'malformed', 'malformed')
    """
    at = next((i for i, token in enumerate(ids) if token in TAG_IDS), len(ids))
    state, action = ids[:at], ids[at:]
    text = ENC.decode([token for token in action if token not in TAG_IDS])  # broken UTF-8 becomes U+FFFD
    tags = [token for token in action if token in TAG_IDS]
    if tags in ([QUERY, END], [ANSWER, END]) and action[-1] == END:
        return "query" if tags[0] == QUERY else "answer", state, action, text
    return "malformed", state, action, text


# ----------------------------------------------------------------------------------------------
# The trajectory


@dataclass
class Turn:
    """One exchange with the environment, as token ids; the three parts follow each other in the context."""
    state: list  # <IS> ...
    action: list  # <query> ... <end>, or <answer> ... <end>
    info: list  # <info> ...; empty after the last turn

    @property
    def written(self):
        """What the agent wrote; its <IS> was given."""
        return self.state[1:] + self.action


@dataclass
class Branch:
    """A path from the end of the task to a leaf. Parallel lists, one entry a token."""
    ids: list = field(default_factory=list)
    trained: list = field(default_factory=list)  # loss mask: True where the agent chose the token, here
    logp: list = field(default_factory=list)  # as sampled; 0 where not trained
    value: list = field(default_factory=list)  # of the row that predicted the token; 0 where not trained
    see: object = None  # (n, P + n) bool: what of task and branch each token may attend to; None: all up to itself

    def extend(self, ids, trained, logp=None, value=None):
        self.ids += ids
        self.trained += [trained] * len(ids)
        self.logp += logp or [0.0] * len(ids)
        self.value += value or [0.0] * len(ids)


@dataclass
class Trajectory:
    """An episode: the trunk, its branches, and what the environment said of it."""
    env: object
    task: list  # <task> ..., the trunk
    branches: list = field(default_factory=list)
    turns: list = field(default_factory=list)
    positions: object = None  # positions[d] is the position of depth d, in the task and in every branch; only demonstrations spread them (train.py). None: position = depth
    cached: int = 0  # tokens of the last branch that are in the sampler's cache
    spans: list = field(default_factory=list)  # (seen, wrote) a turn: tokens in context before it wrote, task not counted
    valid: int = 0  # well-formed turns
    seconds: float = 0.0  # wall time of its rollout, shared with the episodes beside it
    kv_bytes: int = 0  # key-value memory allocated for it

    def open_turn(self, policy):
        """Put into context what the agent sees before it writes. True if for that a new branch was begun."""
        context = [*(policy(self.turns) if self.turns else []), IS]
        pruned = not self.branches or context[: len(self.branches[-1].ids)] != self.branches[-1].ids
        if pruned:
            self.branches.append(Branch())
        self.branches[-1].extend(context[len(self.branches[-1].ids) :], trained=False)
        return pruned

    def close_turn(self, ids, logp=None, value=None):
        """What the agent wrote; the environment takes its step."""
        self.branches[-1].extend(ids, trained=True, logp=logp, value=value)
        self.cached = len(self.branches[-1].ids) - 1  # the sampler has not fed back the last token
        self.spans.append((len(self.branches[-1].ids) - len(ids), len(ids)))
        kind, state, action, text = parse(ids)
        observation = self.env.step(kind, text)
        info = [] if self.env.done else [INFO, *ENC.encode_ordinary(observation)]
        self.turns.append(Turn([IS, *state], action, info))
        self.valid += kind != "malformed"

    @property
    def reward(self):
        """Share of the objectives answered exactly: the paper's EM count, scaled to 0..1."""
        return self.env.em / self.env.n_objectives

    def rewards(self, kind="em"):
        """What each turn earned, for the learner, by one of envs.REWARDS."""
        values = list(self.env.gains) if kind == "step" else [0.0] * len(self.turns)
        values[-1] += envs.REWARDS.get(kind, envs.REWARDS["em"])(self.env)  # a judge's is not known here
        return values

    @property
    def peak(self):
        """Most tokens in context over the turns, task not counted (MEM1 app. A.4)."""
        return max((seen + wrote for seen, wrote in self.spans), default=0)

    @property
    def dependency(self):
        """How many tokens all that was written looked back on (MEM1 app. A.4): token i of a turn, from 0, on `seen` + i and half of itself."""
        return sum((seen + wrote / 2) * wrote for seen, wrote in self.spans)

    @property
    def n_trained(self):
        """Tokens that the agent chose."""
        return sum(sum(branch.trained) for branch in self.branches)


def tree(traj):
    """All tokens of a trajectory, the task's and then each branch's: (ids, parent, trained), lists of n.

    parent[i] is the token right before i in its context, -1 for the first. All else follows from it:

        i's context     the path from the root to i: row i of mask(traj)
        its position    its depth
        its prediction  comes from the row of parent[i]
        the loss        counts it if trained[i]: the agent chose it, here

    >>> ids, parent, trained = tree(sketch(mem1, turns=3))
    >>> parent
    [-1, 0, 1, 2, 3, 4, 0, 6, 7, 8, 9]
    """
    n = len(traj.task)
    ids, parent, trained = list(traj.task), list(range(-1, n - 1)), [False] * n
    for branch in traj.branches:
        parent += [n - 1, *range(len(ids), len(ids) + len(branch.ids) - 1)]
        ids, trained = ids + branch.ids, trained + branch.trained
    return ids, parent, trained


def mask(traj):
    """Who sees whom (n, n), bool. A token sees its parent, what that sees, and itself.

    Three turns of MEM1 in nothing but tags: Task, then State, Query, Info a turn; `*` is trained.

    >>> print(picture(sketch(mem1, turns=3)))
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

    The first two turns share a branch, as nothing is pruned yet. Then the first turn is gone, and the
    second is read again in a branch of its own: there it is not trained a second time.
    """
    ids, parent, _ = tree(traj)
    see = np.eye(len(ids), dtype=bool)
    for i, p in enumerate(parent[1:], 1):
        see[i] |= see[p]
    if traj.branches and traj.branches[0].see is not None:  # a layout that is not a tree, see stitched()
        see[len(traj.task) :] = traj.branches[0].see
    return see


def picture(traj):
    """mask() as text, a row a token."""
    ids, _, trained = tree(traj)
    names = ["TSQAIE"[TAG_IDS.index(token)] if token in TAG_IDS else "-" for token in ids]
    rows = [" ".join([name, *("1" if x else "." for x in row), *"*"[: t]]) for name, row, t in zip(names, mask(traj), trained)]
    return "\n".join(["  " + " ".join(names), *rows])


def sketch(policy, turns):
    """The smallest trajectory of so many turns: a state, a query and an info of one token each."""
    env = SimpleNamespace(step=lambda kind, text: "", done=False)
    traj = Trajectory(env, [TASK])
    for t in range(turns):
        env.done = t == turns - 1
        traj.open_turn(policy)
        traj.close_turn([QUERY])
    return traj


# ----------------------------------------------------------------------------------------------
# Context policies: of the turns so far, the tokens that the next turn sees (the task is always seen).


def mem1(turns):
    """The last internal state, query and info, and nothing else (MEM1 sec. 3.1)."""
    last = turns[-1]
    return last.state + last.action + last.info


def full(turns):
    """Everything: the agent whose context grows with every turn (ReAct, Search-R1). One branch, a causal mask.

    >>> print(picture(sketch(full, turns=3)))
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


def window(turns, k=3):
    """The last k turns, and nothing of those before.

    >>> print(picture(sketch(partial(window, k=2), turns=4)))
      T S Q I S Q I S Q S Q I S Q I S Q
    T 1 . . . . . . . . . . . . . . . .
    S 1 1 . . . . . . . . . . . . . . .
    Q 1 1 1 . . . . . . . . . . . . . . *
    I 1 1 1 1 . . . . . . . . . . . . .
    S 1 1 1 1 1 . . . . . . . . . . . .
    Q 1 1 1 1 1 1 . . . . . . . . . . . *
    I 1 1 1 1 1 1 1 . . . . . . . . . .
    S 1 1 1 1 1 1 1 1 . . . . . . . . .
    Q 1 1 1 1 1 1 1 1 1 . . . . . . . . *
    S 1 . . . . . . . . 1 . . . . . . .
    Q 1 . . . . . . . . 1 1 . . . . . .
    I 1 . . . . . . . . 1 1 1 . . . . .
    S 1 . . . . . . . . 1 1 1 1 . . . .
    Q 1 . . . . . . . . 1 1 1 1 1 . . .
    I 1 . . . . . . . . 1 1 1 1 1 1 . .
    S 1 . . . . . . . . 1 1 1 1 1 1 1 .
    Q 1 . . . . . . . . 1 1 1 1 1 1 1 1 *
    """
    return full(turns[-k:])


def notes(turns, k=2):
    """The last turn, and of the earlier ones the k that share most words with its query: an external memory with
    retrieval (after A-MEM, arXiv 2502.12110, as in MEM1 app. A.4). Of equals the later."""
    *earlier, last = turns
    alike = lambda t: (len(set(last.action) & set(earlier[t].state + earlier[t].action + earlier[t].info)), t)
    return full([earlier[t] for t in sorted(sorted(range(len(earlier)), key=alike)[-k:])] + [last])


def amnesic(turns):
    """The last query and info without the state: what can be done with no memory at all."""
    return turns[-1].action + turns[-1].info


def separate(turns):
    """As mem1, but of the state only what stands behind the `;` is kept: what is before it reasons, and is thrown
    away, what is behind it remembers (the ablation of MEM1's ICLR version; the shape of MemAgent, arXiv 2507.02259)."""
    last = turns[-1]
    memory = last.state[last.state.index(SPLIT) :] if SPLIT in last.state else []
    return memory + last.action + last.info


POLICIES = {"mem1": mem1, "full": full, "window": window, "notes": notes, "amnesic": amnesic, "separate": separate}

# ----------------------------------------------------------------------------------------------
# Acting


def demonstrate(env, policy, amnesic=False):
    """An episode played by the scripted demonstrator, who sees what `policy` keeps, as a trajectory to imitate."""
    traj = Trajectory(env, [TASK, *ENC.encode_ordinary(env.prompt)])
    while not env.done:
        traj.open_turn(policy)
        traj.close_turn(expert(env, policy, traj.turns, amnesic))
    return traj


def expert(env, policy, turns, amnesic=False):
    """What the demonstrator would write after `turns`, as ids."""
    style = {separate: "apart", full: "fresh", window: "fresh", notes: "fresh"}.get(policy, "whole")
    state, kind, text = env.expert(ENC.decode(policy(turns)) if turns else "", amnesic, style)
    encode = lambda words: ENC.encode_ordinary(" " + words if words else "")
    return [*encode(state), QUERY if kind == "query" else ANSWER, *encode(text), END]


def turn_cap(env):
    """Tokens that an agent may write in a turn: a state that holds all objectives, and half as much again."""
    return (2 + env.width) * (8 + env.n_objectives)


@torch.no_grad()
def rollout(model, environments, policy, rngs=None):
    """Play all `environments` side by side, each to its end. Returns their trajectories, in order.

    rngs: a numpy Generator an episode, so that an episode is the same whatever runs beside it.
    None: greedy, the likeliest token always.
    """
    device, dtype, started = model.emb.weight.device, model.emb.weight.dtype, time.perf_counter()
    trajs = [Trajectory(env, [TASK, *ENC.encode_ordinary(env.prompt)]) for env in environments]
    cache = Cache(model, len(trajs))
    feed(model, cache, [traj.task for traj in trajs])  # the trunk: encoded once an episode
    cache.keep_prompt()
    live = trajs  # live[b]: the episode in row b of the cache
    while live:
        # 1. Bring each context up to date. Where something was pruned, only the task is still in the cache.
        pruned = [traj.open_turn(policy) for traj in live]
        cache.rollback(torch.tensor(pruned, device=device))
        pending = [traj.branches[-1].ids[0 if new else traj.cached :] for traj, new in zip(live, pruned)]
        hidden = feed(model, cache, pending)  # (B, C)
        # 2. All write. An episode draws as many numbers whatever its neighbours do.
        caps, uniform = [turn_cap(traj.env) for traj in live], None
        if rngs is not None:
            draws = [np.pad(1 - rng.random(cap), (0, max(caps) - cap)) for rng, cap in zip(rngs, caps)]
            uniform = torch.tensor(np.stack(draws), device=device, dtype=dtype)  # (B, max cap)
        wrote, row = write(model, cache, hidden, caps, uniform)
        # 3. The environments answer; episodes that are over leave the batch.
        for traj, turn in zip(live, wrote):
            traj.close_turn(*turn)
        order = cache.keep([not live[r].env.done for r in row])[: cache.B]
        live, rngs = [live[row[b]] for b in order], rngs and [rngs[row[b]] for b in order]
    for traj in trajs:
        traj.seconds, traj.kv_bytes = (time.perf_counter() - started) / len(trajs), cache.bytes // len(trajs)
    return trajs


def feed(model, cache, rows):
    """Put ragged lists of ids, one a row of the cache, behind what is there -> the hidden state after each (B, C)."""
    device, T = model.emb.weight.device, max(map(len, rows))
    n = torch.tensor([len(row) for row in rows], device=device)  # (B,)
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)  # (B, T)
    x = model(ids, cache.reserve(T, n), cache)  # (B, T, C)
    return x[torch.arange(len(rows), device=device), n - 1]  # (B, C)


def write(model, cache, hidden, caps, uniform):
    """One turn of every row: sample until <end>, or until the row's cap. hidden (B, C) predicts the first token.

    Returns what each row wrote [(ids, logp, value), ...], and `row`: row[b] is whose tokens are in row b of
    the cache now, since rows that have ended make room: when a quarter has, the last rows take their places.
    """
    B, device, dtype = len(caps), hidden.device, hidden.dtype
    cap = torch.tensor(caps, device=device)  # (B,)
    ids = torch.zeros(B, max(caps), device=device, dtype=torch.long)  # (B, max cap)
    logp, value = torch.zeros_like(ids, dtype=dtype), torch.zeros_like(ids, dtype=dtype)  # (B, max cap)
    length = torch.zeros_like(cap)  # (B,) tokens written
    row = torch.arange(B, device=device)  # (B,)
    writing = torch.ones_like(row, dtype=torch.bool)  # (cache.B,), in the order of the cache
    for t in range(max(caps)):
        mine = row[: cache.B]
        ids[mine, t], logp[mine, t] = sample(model.logits(hidden), None if uniform is None else uniform[mine, t])
        value[mine, t] = model.value(hidden)
        length[mine] += writing
        writing = writing & (ids[mine, t] != END) & (t + 1 < cap[mine])
        n_writing = int(writing.sum())  # the one wait for the device in this loop
        if n_writing == 0:
            break
        if n_writing <= 0.75 * cache.B:
            order = cache.keep(writing.tolist())
            row[: len(order)] = mine[order]
            writing = torch.ones(n_writing, device=device, dtype=torch.bool)  # (cache.B,)
        token = ids[row[: cache.B], t][:, None]  # (cache.B, 1)
        hidden = model(token, cache.reserve(1, writing.long()), cache)[:, 0]  # (cache.B, C)
    cache.B = B
    columns = zip(ids.tolist(), logp.tolist(), value.tolist(), length.tolist())
    return [(i[:n], l[:n], v[:n]) for i, l, v, n in columns], row.tolist()


def sample(logits, uniform=None):
    """One token a row, by inverse transform: logits (B, V), uniform (B,) in (0, 1] -> ids (B,), logp (B,).

    A uniform number a token makes an episode's choices its own, whatever stands in the rows beside it.
    Temperature 1 and no filter: what is sampled from is what is trained. None: the likeliest token.
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
class Pack:
    """Some branches and the trunks they grow from as one list of N tokens, of which each knows its own context. No padding, and
    no trunk twice. What is trained is listed flat (M,).

    >>> (p,) = pack([sketch(mem1, turns=3)])  # T SQISQ SQISQ: the task and two branches, as in mask()
    >>> p.pos[0].tolist()
    [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
    >>> (p.before[2] - 1).tolist()  # the parents
    [-1, 0, 1, 2, 3, 4, 0, 6, 7, 8, 9]
    >>> p.at.tolist()  # which tokens predict one that is trained: here the `S` before each `Q` that the agent wrote
    [1, 4, 9]
    """
    ids: torch.Tensor  # (1, N)
    pos: torch.Tensor  # (1, N)
    before: torch.Tensor  # (3, N) where the three tokens before it are, + 1; 0: there is none
    rectangles: list  # contexts of like length, for attention: (queries (R, S), keys (R, L), see (R, S, L) bool), places of tokens
    place: torch.Tensor  # (N,) where what is read for a token is, in the rectangles laid end to end
    at: torch.Tensor  # (M,) the token whose row predicts a trained one: its parent
    target: torch.Tensor  # (M,) id of the trained token
    index: torch.Tensor  # (M,) its place among all trained tokens of the trajectories, in the order of sampling

    def to(self, device):
        pin = (lambda x: x.pin_memory()) if torch.device(device).type == "cuda" else lambda x: x  # then the copy does not wait
        move = lambda x: type(x)(map(move, x)) if isinstance(x, (list, tuple)) else pin(x).to(device, non_blocking=True)
        return Pack(**{name: move(x) for name, x in vars(self).items()})


def pack(trajs, budget=8192, which=None):
    """Trajectories as a list of Packs of about `budget` tokens.

    which: only these trajectories; `index` still counts the tokens of all. Every trained token is in
    exactly one Pack. With nothing to train comes one Pack of no trained tokens, so that a process
    without work still takes part in the backward pass of the others.
    """
    chunks, size, first, held = [[]], 0, 0, None  # first: place of a branch's first trained token; held: whose task is in last
    for i, traj in enumerate(trajs):
        for branch in traj.branches:
            if which is None or i in which:
                if size >= budget:
                    chunks, size, held = [*chunks, []], 0, None
                size += len(branch.ids) + (len(traj.task) if i != held else 0)
                held = i
                chunks[-1].append((i, branch, first))
            first += sum(branch.trained)
    return [_collate(trajs, chunk or [(0, Branch([IS], [False]), 0)]) for chunk in chunks]


def _collate(trajs, chunk):
    """Branches `chunk` [(trajectory, branch, first)] and their trunks as one Pack."""
    ids, pos, before, contexts, trunks = [], [], [], [], {}
    at, target, index = [], [], []

    def add(new, positions, trunk, see=None):
        """Put tokens behind those at `trunk`. Their places."""
        mine = np.arange(len(ids), len(ids) + len(new))
        keys = np.concatenate([trunk, mine])
        contexts.append((mine, keys, np.tri(len(keys), dtype=bool)[len(trunk) :] if see is None else see))
        keys = np.concatenate([np.full(WIDTH - 1, -1), keys])
        before.append([keys[j : j + len(new)] + 1 for j in range(len(trunk), len(trunk) + WIDTH - 1)])
        ids.extend(new)
        pos.extend(positions)
        return mine

    for i, branch, first in chunk:
        P, n = len(trajs[i].task), len(branch.ids)
        depths = np.arange(P + n) if trajs[i].positions is None else trajs[i].positions[: P + n]
        if i not in trunks:
            trunks[i] = add(trajs[i].task, depths[:P], np.arange(0))
        mine = add(branch.ids, depths[P:], trunks[i], branch.see)
        trained = np.flatnonzero(branch.trained)  # never 0: a branch begins with what was given
        at.append(mine[trained - 1])
        target.append(np.array(branch.ids)[trained])
        index.append(first + np.arange(len(trained)))
    rectangles, place = _rectangles(contexts, len(ids))
    arrays = dict(ids=[ids], pos=[pos], before=np.concatenate(before, 1), place=place, at=np.concatenate(at),
                  target=np.concatenate(target), index=np.concatenate(index))
    return Pack(rectangles=rectangles, **{name: torch.as_tensor(np.asarray(x)) for name, x in arrays.items()})


def _rectangles(contexts, n):
    """Contexts [(places of those who look, places that they may look at, who sees what), ...] of n tokens as rectangles and place of a Pack.

    The context in which most tokens look sets the height of a rectangle; those with at least three quarters as many share it.
    """
    contexts.sort(key=lambda context: (-len(context[0]), -len(context[1])))
    rectangles, place, filled = [], np.zeros(n, int), 0
    while contexts:
        S = len(contexts[0][0])
        R = sum(len(mine) >= 0.75 * S for mine, _, _ in contexts)
        L = max(len(keys) for _, keys, _ in contexts[:R])
        queries, keys, see = np.zeros((R, S), int), np.zeros((R, L), int), np.zeros((R, S, L), bool)
        for r, (q, k, sees) in enumerate(contexts[:R]):
            queries[r, : len(q)], keys[r, : len(k)], see[r, : len(q), : len(k)] = q, k, sees
            place[q] = filled + r * S + np.arange(len(q))
        rectangles.append(tuple(map(torch.as_tensor, (queries, keys, see))))
        contexts, filled = contexts[R:], filled + R * S
    return rectangles, place


def recorded(trajs, name):
    """What the sampler wrote down ("logp", "value" or "ids") of all trained tokens, flat, in the order of sampling."""
    return [x for traj in trajs for branch in traj.branches for x, trained in zip(getattr(branch, name), branch.trained) if trained]


def evaluate(model, pack):
    """The learner's view of a Pack: logp, value and entropy (M,) of its trained tokens, with gradients.

    A trunk is encoded once; each branch attends to its trunk's keys and values and to itself. That is
    what the sampler did, by the same `forward`, so logp equals what was recorded.
    """
    x = model(pack.ids, pack.pos, Tree(pack))[0, pack.at]  # (M, C)
    logps = model.logits(x).log_softmax(-1)  # (M, V)
    logp = logps.gather(-1, pack.target[:, None]).squeeze(-1)  # (M,)
    return logp, model.value(x), -(logps.exp() * logps).sum(-1)


# ----------------------------------------------------------------------------------------------
# Two layouts that are not the tree, to measure what they cost: another view of a MEM1 trajectory for the learner


def stitched(traj, released=False):
    """The paper's layout (sec. 3.3, app. A.7): every token once, and a mask hides what its turn did not see.

    >>> print(picture(stitched(sketch(mem1, turns=3))))
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

    From turn 3 on it is not what acted. The keys that turn 3 reads of turn 2 were computed while turn 2 still
    saw turn 1, so from the second layer on they carry it (and at the seam of two turns the convolution does in
    the first); and positions go on, where the agent's began anew.

    released: the layout of the paper's published code. It also hides the previous state, which the agent did
    see, and an <info> sees nothing but itself.

    >>> print(picture(stitched(sketch(mem1, turns=3), released=True)))
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
    branch, turn, part = Branch(), [-1] * len(traj.task), ["task"] * len(traj.task)
    for t, this in enumerate(traj.turns):
        branch.extend(this.state[:1], trained=False)  # its <IS> is given
        branch.extend(this.written, trained=True)
        branch.extend(this.info, trained=False)
        for name, ids in vars(this).items():  # state, action, info
            turn += [t] * len(ids)
            part += [name] * len(ids)
    turn, part = np.array(turn), np.array(part)
    ago = turn[:, None] - turn  # turns between the one who reads and what is read
    see = np.tri(len(turn), dtype=bool) & ((part == "task") | (ago <= 1))
    if released:
        see &= (ago == 0) | (part != "state")
        see &= (part[:, None] != "info") | ((ago == 0) & (part == "info"))
    branch.see = see[len(traj.task) :]
    return replace(traj, branches=[branch])


LAYOUTS = {"tree": lambda traj: traj, "stitched": stitched, "released": partial(stitched, released=True)}
