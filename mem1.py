"""mem1.py: an agent that rewrites its memory at every turn (MEM1, arXiv 2506.15841).

Most agents append every turn to their context. A MEM1 agent rewrites one compact internal state,
<IS>, at every turn. Of the past, the next turn sees only that state, the last query and its result:

    turn 1   prompt                                  <IS> a <query> q <end>
    turn 2   prompt  <IS> a <query> q <end> <info> i  <IS> b <query> r <end>
    turn 3   prompt  <IS> b <query> r <end> <info> j  <IS> c <answer> ... <end>
             ------  ------------------------------  -------------------------
             kept    kept from the last turn:        written now: in the loss, exactly
             always  only read, not in the loss      once (all but <IS>, which is given)

The rule of this code: every token is trained in the context in which it was sampled. A Turn holds
what the agent saw and what it wrote; the learner reads the two as one row under a plain causal
mask, and the loss is on what was written. Nothing is approximated.

An environment (envs.py) has a prompt; step(kind, text), which returns text after a query; done; em,
how many of its n_objectives were answered right. An answer ends the episode; so does, unrewarded,
anything malformed, or a query in the last turn. A task may be a piece of a longer one: its prompt
has n_questions, the agent answers n_objectives of them, and history holds the turns that a scripted
demonstrator has played before. Agents first imitate the demonstrator: env.expert() gives its next
turn with oracle notes (the right answers), env.random_notes() with random ones. answers_shown() is
for memory_recall().

Differs from the paper (sec. 3.3) and its released code:
1) the paper stitches one copy of every token into a row and hides what is pruned with a 2-D mask.
   There, the keys of what is kept still depend on what has since been pruned, so from the third
   turn on the learner's policy is not the one that acted. Our rows are exact;
2) there are no closing tags: a segment runs to the next tag, and <end> closes the turn;
3) the first tag of a turn, <IS>, is given to the agent, not sampled and not trained.
"""
import re
import time
from dataclasses import dataclass, field

import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence

import envs
from envs import Stream, keyed_rng
from model import Cache

# --- Tokens. Tags are special tokens; every word of envs.WORDS is one token; the rest is bytes.

TAGS = ["<task>", "<IS>", "<query>", "<answer>", "<info>", "<end>"]


class Tokenizer:
    """A tiktoken.Encoding of 256 bytes, each of `words` as one token (with its space), and TAGS.

    Built from our own ranks, so that nothing is downloaded. Text goes in by `encode_ordinary`
    alone, which cannot yield a tag, whatever the text says:

    >>> ids = ENC.encode_ordinary("<info> <answer> #1 x <end>")
    >>> any(token in TAG_IDS for token in ids), ENC.decode(ids)
    (False, '<info> <answer> #1 x <end>')
    """

    def __init__(self, words):
        pieces = [bytes([i]) for i in range(256)] + [b" " + word.encode() for word in words]
        self.ranks = {piece: i for i, piece in enumerate(pieces)}
        self.tags = {tag: len(pieces) + i for i, tag in enumerate(TAGS)}
        self.add([])  # builds the encoding

    def add(self, words):
        """Append words to the vocabulary; no existing token changes its id.

        >>> more = Tokenizer(envs.WORDS)
        >>> more.add(["jelo", "wool"])
        >>> more.encode_ordinary(" jelo wool") == [*ENC.encode_ordinary(" jelo"), ENC.n_vocab]
        True
        """
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
    """What the agent wrote after its <IS>: (kind, state ids, text of its action). Never fails.

    Well-formed is `state <query> text <end>` or `state <answer> text <end>`; all else is
    "malformed".

    >>> state, text = map(ENC.encode_ordinary, (" #1 jelo", " jelo heir"))
    >>> parse([*state, QUERY, *text, END])[0::2]
    ('query', ' jelo heir')
    >>> parse([QUERY, QUERY, END])[0], parse([QUERY, END, IS])[0], parse([])[0]
    ('malformed', 'malformed', 'malformed')
    """
    tags = [token for token in ids if token in TAG_IDS]
    start = ids.index(tags[0]) if tags else len(ids)
    state, action = ids[:start], ids[start:]
    text = ENC.decode([token for token in action if token not in TAG_IDS])  # broken UTF-8: U+FFFD
    kind = "malformed"
    if ids[-1:] == [END]:
        kind = {(QUERY, END): "query", (ANSWER, END): "answer"}.get(tuple(tags), kind)
    return kind, state, text


# --- The episode, turn by turn


@dataclass
class Turn:
    """One exchange with the environment, as token ids. The learner reads context + written."""
    context: list  # what the agent saw: the prompt, what its context policy kept, <IS>
    written: list  # what it wrote then: its state, <query> ... or <answer> ..., <end>
    info: list = field(default_factory=list)  # <info> ..., the reply; empty after the last turn
    logp: list = field(default_factory=list)  # of each written token, as it was sampled
    value: list = field(default_factory=list)  # the critic's estimate before each token

    @property
    def state(self):
        """The internal state alone, without its <IS>."""
        return parse(self.written)[1]


def prompt_ids(env):
    """What every turn sees: the task after its tag."""
    return [TASK, *ENC.encode_ordinary(env.prompt)]


@dataclass
class Trajectory:
    """An episode."""
    env: object
    prompt: list  # the task; every turn sees it
    turns: list = field(default_factory=list)
    rng: object = None  # what the agent samples with; None: greedy
    seconds: float = 0.0  # wall time of its batch, divided by the episodes in it

    def next_context(self, policy):
        """What the agent sees before it writes its next turn."""
        return [*self.prompt, *visible_context(self.env, policy, self.turns), IS]

    def add_turn(self, context, written, *sampled):
        """Record a turn, and step the environment. sampled: logp and value, if the agent wrote."""
        kind, _, text = parse(written)
        observation = self.env.step(kind, text)
        info = [] if self.env.done else [INFO, *ENC.encode_ordinary(observation)]
        self.turns.append(Turn(context, written, info, *sampled))

    @property
    def reward(self):
        """Share of the objectives answered exactly: the paper's EM count, scaled to 0..1."""
        return self.env.em / self.env.n_objectives

    @property
    def peak(self):
        """Most tokens in context over the turns, prompt not counted (MEM1 app. A.4)."""
        longest = max(len(turn.context) + len(turn.written) for turn in self.turns)
        return longest - len(self.prompt)

    @property
    def dependency(self):
        """Tokens looked back on, summed over the tokens written, prompt not counted: in each turn
        (seen + wrote / 2) * wrote, as in the paper's code (app. A.4)."""
        total = 0
        for turn in self.turns:
            seen, wrote = len(turn.context) - len(self.prompt), len(turn.written)
            total += (seen + wrote / 2) * wrote
        return total

    @property
    def n_trained(self):
        """Number of tokens that the agent chose."""
        return sum(len(turn.written) for turn in self.turns)


def memory_recall(traj):
    """(shown, held), summed over the turns that search: how many answers the agent asked for and
    was shown in its earlier turns, and how many of them its state holds (few, for keep_all)."""
    found = set()  # {(index, answer), ...}
    shown, held = 0, 0
    for turn in traj.turns:
        kind, state, text = parse(turn.written)
        if kind == "query":
            shown += len(found)
            held += len(found.intersection(re.findall(envs.ENTRY, ENC.decode(state))))
        found |= traj.env.answers_shown(text, ENC.decode(turn.info))
    return shown, held


# --- Context policies: what the next turn sees of the turns so far. It always sees the prompt.


def keep_last(turns):
    """MEM1 (sec. 3.1): the last internal state, query and info, and nothing else."""
    return keep_all(turns[-1:])


def keep_all(turns):
    """The agent whose context grows with every turn (ReAct, Search-R1)."""
    return [token for turn in turns for token in (IS, *turn.written, *turn.info)]


def keep_all_relist(turns):
    """keep_all, but the demonstrator lists all answers in every state, as under keep_last (expert()
    compares `policy` with keep_all). Separates the effect of rewriting from that of pruning."""
    return keep_all(turns)


def keep_window(turns):
    """The last three turns: a truncated history."""
    return keep_all(turns[-3:])


def keep_similar(turns):
    """The last turn and the two earlier ones that share most words with its query; ties go to the
    later. An external memory with retrieval (after A-MEM, arXiv 2502.12110; MEM1 app. A.4)."""
    *earlier, last = turns
    query = set(last.written[len(last.state) :])
    overlap = [len(query & {*turn.written, *turn.info}) for turn in earlier]
    nearest = sorted(range(len(earlier)), key=lambda t: overlap[t])[-2:]
    return keep_all([earlier[t] for t in sorted(nearest)] + [last])


POLICIES = {"mem1": keep_last, "full": keep_all, "full-list": keep_all_relist,
            "window": keep_window, "similar": keep_similar}


def visible_context(env, policy, turns):
    """What the next turn sees of the past, as ids."""
    turns = env.history + turns
    return policy(turns) if turns else []


# --- What to imitate


def expert(env, policy, turns, rng=None):
    """What the demonstrator would write after `turns`, as ids. It sees what `policy` keeps.

    rng: None for oracle notes; a numpy Generator for random ones.
    """
    seen = ENC.decode(visible_context(env, policy, turns))
    if rng is None:  # with keep_all older answers stay in view, so only new ones are listed
        state, kind, text = env.expert(seen, fresh=policy is keep_all)
    else:
        state, kind, text = env.random_notes(seen, rng)
    tag = QUERY if kind == "query" else ANSWER
    state_ids, ids = [ENC.encode_ordinary(f" {said}") if said else [] for said in (state, text)]
    return [*state_ids, tag, *ids, END]


def expert_rollout(env, policy, rng=None, until=None):
    """An episode of the demonstrator, to imitate. With `until`, an index such as "#65", it ends
    before the turn that begins on that question, or that answers."""
    traj = Trajectory(env, prompt_ids(env))
    while not env.done:
        written = expert(env, policy, traj.turns, rng)
        if until and (ANSWER in written or f"{until} :" in ENC.decode(written)):
            break
        traj.add_turn(traj.next_context(policy), written)
    return traj


def play_history(env, policy, first, rng=None):
    """The demonstrator plays up to question `first` (from 0), under this context policy; its turns
    become env.history. The agent goes on from there, and sees what it would see at that point of
    the whole task. rng: as in expert()."""
    index = envs.read_questions(env.prompt)[first][0]
    env.history = expert_rollout(env, policy, rng, until=index).turns


def exercise(cfg, step, i, longest):
    """One reading exercise, as a trajectory: its trained parts are what the turns wrote."""
    rng = keyed_rng(cfg.seed, Stream.PRIMER, step, i)
    text, parts = envs.exercise_text(rng, longest, envs.world(cfg.env).extra_words)
    context = ENC.encode_ordinary(text)
    traj = Trajectory(None, context)
    for part, is_trained in parts:
        ids = ENC.encode_ordinary(part)
        if is_trained:
            traj.turns.append(Turn(context, ids))
        context = context + ids
    return traj


# --- Acting


def turn_cap(env):
    """Most tokens that an agent may write in a turn: two per question, and room for the rest."""
    return 2 * env.n_questions + 24


def rollout(model, environments, policy, rngs=None, batch=64):
    """Play all `environments`, each to its end. Returns their trajectories, in order.

    batch  how many are played side by side, which bounds the size of the key-value cache
    rngs   one numpy Generator per episode, so that an episode is the same whatever runs beside it;
           None: greedy, always the likeliest token
    """
    rngs = rngs or [None] * len(environments)
    trajs = [Trajectory(env, prompt_ids(env), rng=rng)
             for env, rng in zip(environments, rngs, strict=True)]
    by_length = sorted(trajs, key=lambda traj: len(traj.prompt))  # little padding
    for i in range(0, len(trajs), batch):
        rollout_batch(model, by_length[i : i + batch], policy)
    return trajs


@torch.no_grad()
def rollout_batch(model, trajs, policy):
    """Play some trajectories to their ends, side by side: all sampled, or all greedy."""
    weight = model.emb.weight
    started = time.perf_counter()
    cache = Cache(model, len(trajs))
    feed(model, cache, [traj.prompt for traj in trajs])  # read once an episode
    cache.keep_prompt()
    live = list(trajs)  # live[b]: the episode in row b of the cache
    while live:
        # 1. Bring each context up to date. Where something is pruned, all but the prompt is
        # forgotten, and what was kept is fed in again; otherwise only what is new.
        contexts = [traj.next_context(policy) for traj in live]
        pruned, pending = [], []
        for b, (traj, context) in enumerate(zip(live, contexts)):
            start = len(traj.prompt)
            if traj.turns:
                fed = traj.turns[-1].context + traj.turns[-1].written
                if context[: len(fed)] == fed:
                    start = len(fed) - 1  # the cache holds all of it but the last token
                else:
                    pruned.append(b)
            pending.append(context[start:])
        cache.rollback(pruned)
        hidden = feed(model, cache, pending)  # (B, C)

        # 2. Every episode writes a turn, and draws as many numbers as its own cap, used or not.
        caps = [turn_cap(traj.env) for traj in live]
        uniform = None
        if live[0].rng is not None:
            draws = [1 - traj.rng.random(cap) for traj, cap in zip(live, caps)]  # in (0, 1]
            uniform = padded(draws).to(weight)  # (B, max cap)
        written, order = write(model, cache, hidden, caps, uniform)

        # 3. The environments respond; finished episodes leave the batch.
        for traj, context, (ids, logp, value) in zip(live, contexts, written):
            traj.add_turn(context, ids, logp, value)
        live = [live[b] for b in order]  # write() has moved rows
        going = [not traj.env.done for traj in live]
        cache.compact(torch.tensor(going, device=weight.device))
        live = [traj for traj in live if not traj.env.done]
    seconds = (time.perf_counter() - started) / len(trajs)
    for traj in trajs:
        traj.seconds = seconds


def feed(model, cache, new):
    """Append new ids to each row of the cache. Returns the hidden states (B, C) after the last."""
    device = model.emb.weight.device
    ids = padded(new).to(device)  # (B, T)
    n = torch.tensor([len(row) for row in new], device=device)  # (B,)
    cache.reserve(ids.size(1), n)
    x = model(ids, cache)  # (B, T, C)
    return x[torch.arange(len(new), device=device), n - 1]  # (B, C)


def padded(sequences):
    """Sequences of numbers as one tensor (B, T), with zeros after the shorter ones."""
    return pad_sequence([torch.tensor(one) for one in sequences], batch_first=True)


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
    writing = torch.ones_like(order, dtype=torch.bool)  # (cache.B,)
    for t in range(max(caps)):
        row = order[: cache.B]  # (cache.B,)
        drawn = None if uniform is None else uniform[row, t]
        ids[row, t], logp[row, t] = sample(model.logits(hidden), drawn)
        value[row, t] = model.value(hidden)
        length[row] += writing
        writing &= (ids[row, t] != END) & (t + 1 < cap[row])
        n_writing = int(writing.sum())  # waits for the device
        if n_writing == 0:
            break
        if n_writing <= 0.75 * cache.B:  # drop finished rows: up to 1.8 times as fast
            moved = cache.compact(writing)
            order[: len(moved)] = row[moved]
            writing = writing[moved][: cache.B]  # (cache.B,)
        # Finished rows that are still in the batch become padding: their tokens take no slot.
        cache.reserve(1, writing.long())
        hidden = model(ids[order[: cache.B], t, None], cache)[:, 0]  # (cache.B, C)
    cache.B = B  # the finished rows take part again
    columns = zip(ids.tolist(), logp.tolist(), value.tolist(), length.tolist())
    return [(i[:n], lp[:n], v[:n]) for i, lp, v, n in columns], order.tolist()


def sample(logits, uniform=None):
    """One token per row, by inverse transform: logits (B, V) -> ids, logp (B,).

    uniform (B,) in (0, 1]: one number per token, drawn by the episode's own generator, so that what
    it samples does not depend on the rows beside it; None: greedy. Temperature 1 and no filtering,
    so the distribution sampled from is the one that is trained.
    """
    logps = logits.log_softmax(-1)  # (B, V)
    if uniform is None:
        ids = logps.argmax(-1)
    else:
        cdf = logps.exp().cumsum(-1)  # (B, V)
        ids = (cdf < uniform[:, None] * cdf[:, -1:]).sum(-1)
    return ids, logps.gather(-1, ids[:, None]).squeeze(-1)


# --- Learning: turns as the learner sees them


@dataclass
class Rows:
    """Some rows of token ids, right-padded, to be read under a causal mask.

    There is one row a turn, its context and then what was written, except that a turn whose context
    begins with the whole row before it shares that row, as nothing was pruned. Below, T is the
    task, S <IS>, Q a query, I an info, and 1 stands where the token is trained:

    >>> for policy in keep_last, keep_all:
    ...     for ids, loss_mask in merged_turns(sketch(policy, turns=3)):
    ...         print(*["TSQAIE"[TAG_IDS.index(token)] for token in ids])
    ...         print(*map(int, loss_mask))
    T S Q I S Q
    0 0 1 0 0 1
    T S Q I S Q
    0 0 0 0 0 1
    T S Q I S Q I S Q
    0 0 1 0 0 1 0 0 1

    MEM1's first two turns share a row, since nothing is pruned yet. Then the first turn is dropped,
    and the second is re-read in a new row, where it is not trained a second time.
    """
    ids: torch.Tensor  # (B, T)
    loss_mask: torch.Tensor  # (B, T) bool: True where the agent chose the token, in this row
    place: torch.Tensor  # (m,) of each trained token among all M of the trajectories

    def to(self, device):
        return type(self)(*[part.to(device) for part in vars(self).values()])


def merged_turns(traj):
    """The rows of an episode: [(ids, loss_mask), ...], see Rows. Sharing a row only saves time."""
    rows = []
    for turn in traj.turns:
        if not rows or turn.context[: len(rows[-1][0])] != rows[-1][0]:
            rows.append(([], []))
        ids, loss_mask = rows[-1]
        new = turn.context[len(ids) :]
        ids += new + turn.written
        loss_mask += [False] * len(new) + [True] * len(turn.written)
    return rows


def make_rows(trajs, budget=8192, which=None):
    """Trajectories as a list of Rows of at most `budget` tokens, padding included; a longer row
    goes alone.

    which: only these trajectories; `place` still counts the trained tokens of all. Every trained
    token is in exactly one of the Rows. With nothing to train there is one row without loss, so
    that a process with no work still joins the all-reduce of DDP.
    """
    rows, end = [], 0  # end: how many trained tokens there are up to the end of this row
    for i, traj in enumerate(trajs):
        for ids, loss_mask in merged_turns(traj):
            start, end = end, end + sum(loss_mask)
            if which is None or i in which:
                rows.append((ids, loss_mask, torch.arange(start, end)))
    if not rows:
        rows = [([IS], [False], torch.arange(0))]
    rows.sort(key=lambda row: -len(row[0]))  # rows of like length side by side: little padding
    batch = []
    while rows:
        n = max(1, budget // len(rows[0][0]))  # rows[0] is the longest that is left
        ids, loss_mask, place = zip(*rows[:n])
        batch.append(Rows(padded(ids), padded(loss_mask), torch.cat(place)))  # (B, T) twice, (m,)
        rows = rows[n:]
    return batch


def predict(model, rows):
    """logp, value and entropy (m,) of the trained tokens of Rows, with gradients.

    Every token has the context in which it was sampled, and the forward pass is the sampler's, so
    logp equals what was recorded, up to rounding. The value's gradient stops at its own head: the
    critic reads the actor's hidden states without changing them.
    """
    raw = getattr(model, "module", model)  # without its DDP wrapper
    x = model(rows.ids)  # (B, T, C)
    trained = rows.loss_mask[:, 1:]  # (B, T-1): position t predicts ids[t+1]
    x, target = x[:, :-1][trained], rows.ids[:, 1:][trained]  # (m, C), (m,)
    logps = raw.logits(x).log_softmax(-1)  # (m, V)
    logp = logps.gather(-1, target[:, None]).squeeze(-1)  # (m,)
    return logp, raw.value(x.detach()), -(logps.exp() * logps).sum(-1)


def sketch(policy, turns):
    """The smallest trajectory of `turns` turns: task, <IS>, query and info are one token each."""
    traj = Trajectory(envs.Env(1, max_turns=turns), [TASK])
    for _ in range(turns):
        traj.turns.append(Turn(traj.next_context(policy), [QUERY], [INFO]))
    return traj
