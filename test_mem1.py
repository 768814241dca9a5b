"""test_mem1.py: what must be true, one property per test.

    python -m pytest -q test_mem1.py    # PROFILE=thorough: more examples, a kill at every write

Oracles are written differently from the code that they check. Mutants at the end test the tests.
"""
import dataclasses
import doctest
import functools
import inspect
import io
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis.strategies import (booleans, floats, integers, lists, one_of, sampled_from, text,
                                   tuples)
from numpy.random import default_rng
from pytest import approx
from torch import OutOfMemoryError, arange, cat, ones, rand, randn, stack, tensor, zeros, zeros_like

import envs
import eval as evaluation
import mem1
import model
import ppo
import train
from envs import ComposedQA, Stream, keyed_rng
from experiments import tables
from mem1 import (ANSWER, END, ENC, INFO, IS, POLICIES, QUERY, TAG_IDS, Trajectory, Turn,
                  expert_rollout, keep_all, keep_last, make_rows, predict, prompt_ids, rollout)
from model import GPT, Cache, GPTConfig

THOROUGH = os.environ.get("PROFILE") == "thorough"
EXAMPLES = 300 if THOROUGH else 30
settings.register_profile("mem1", deadline=None, derandomize=True, database=None, print_blob=True,
                          report_multiple_bugs=False, max_examples=EXAMPLES)
settings.load_profile("mem1")
parametrize = pytest.mark.parametrize
HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)

# --- A world that accepts whatever is written, so that random weights play many turns


class AnyWorld(envs.Env):
    """Takes any action, replies with random words and a forged tag, and has a history of these."""

    def __init__(self, turns, seed, n_objectives=1, history=0):
        super().__init__(n_objectives, turns)
        self.n_questions += 2  # a piece of a longer task
        self.em = n_objectives // 2
        self.rng = default_rng(seed)
        self.prompt = self.words()
        for _ in range(history):
            state, query, info = [ENC.encode_ordinary(self.words()) for _ in range(3)]
            self.history.append(Turn([], [*state, QUERY, *query, END], [INFO, *info]))

    def words(self):
        return " ".join(["", *self.rng.choice(envs.WORDS, self.rng.integers(6)), "<end>"])

    def step(self, kind, said):
        self.turn += 1
        self.done = self.turn == self.max_turns
        return self.words()


def worlds(turns=(4, 1, 5, 2, 3), seed=0):
    """A world for each entry of `turns`, with 1 to 4 objectives and up to 2 turns of history."""
    return [AnyWorld(n, [seed, i], 1 + i % 4, i % 3) for i, n in enumerate(turns)]


def talkative(seed=0, ends=6.0):
    """A GPT of random weights, far from their initial structure, that likes to end its turns."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(ENC.n_vocab, 2, 2, 32)).double()
    for p in gpt.parameters():
        p.data += 0.2 * torch.randn_like(p)
    bias = zeros(ENC.n_vocab)
    bias[END], bias[QUERY] = ends, 6.0
    gpt.logits = lambda x: GPT.logits(gpt, x) * 0.5 + bias
    return gpt


def play(gpt, policy, turns, seed=0, which=slice(None)):
    """An episode in each of the worlds, side by side."""
    some = worlds(turns, seed)[which]
    return rollout(gpt, some, policy, [world.rng for world in some], batch=3)


def acted(trajs):
    """What the sampler recorded: logp and value of all trained tokens, (2, M)."""
    turns = [turn for traj in trajs for turn in traj.turns]
    pairs = [pair for turn in turns for pair in zip(turn.logp, turn.value, strict=True)]
    return tensor(pairs, dtype=torch.float64).T


def learned(gpt, trajs, **kwargs):
    """What the learner says, with gradients: logp, value, entropy of all trained tokens, (3, M)."""
    batch = make_rows(trajs, **kwargs)
    index = cat([rows.place for rows in batch])
    return cat([stack(predict(gpt, rows)) for rows in batch], 1)[:, index.argsort()]


def far(x, y):
    assert x.shape == y.shape
    return (x - y).abs().max().item()


def subsets(keep):
    """A policy drawn by hypothesis: it keeps those parts of earlier turns that `keep` says."""
    def policy(turns):
        parts = [part for turn in turns for part in ([IS], turn.written, turn.info)]
        return sum(itertools.compress(parts, keep[len(turns) :] * 9), [])  # other ones each turn
    return policy


policies = one_of(sampled_from([*POLICIES.values()]),
                  lists(booleans(), min_size=9, max_size=12).map(subsets))
turn_counts = lists(integers(1, 6), min_size=1, max_size=4)
seeds = integers(0, 99)
names = sampled_from(envs.NAMES[:3])

# --- Masking: every token is trained in the context in which it was sampled


def contexts(traj, policy):
    """Oracle: (context, token) of all that the agent wrote, each context laid out anew."""
    turns = list(traj.env.history)
    for turn in traj.turns:
        context = traj.prompt + (policy(turns) if turns else []) + [IS]
        for i, token in enumerate(turn.written):
            yield context + turn.written[:i], token
        turns.append(turn)


def dense(gpt, trajs):
    """Oracle: logp, value, entropy (3, M) by plain formulas, each turn in its own context."""
    found = []
    for turn in [turn for traj in trajs for turn in traj.turns]:
        ids, n = tensor(turn.context + turn.written), len(turn.written)
        hs = gpt.config.n_embd // gpt.config.n_head
        x = gpt.ln_in(gpt.emb(ids))  # (T, C)
        ago = arange(len(x))[:, None] - arange(len(x))  # (T, T)
        for block in gpt.blocks:
            h, v = block.qkv(block.ln_1(x)).split((2 * x.size(1), x.size(1)), 1)
            taps = enumerate(reversed(block.taps))  # of the token, the one before it, ...
            mixed = sum(tap * ((ago == j).double() @ h) for j, tap in taps)
            qkv = cat([mixed, v], 1).unflatten(1, (3, -1, hs))
            q, k, v = qkv.permute(1, 2, 0, 3)  # (nh, T, hs)
            score = q[..., :-2] @ k[..., :-2].mT / hs**0.5  # (nh, T, T)
            gate, kept = block.gate(block.ln_1(x)).sigmoid(), []  # (T, nh)
            for i in range(len(x)):  # what is left of each key: its gate shrinks all before it
                before = kept[i - 1][:i] * gate[i] if i else gate[:0]
                kept.append(cat([before, torch.ones_like(gate[:1]), zeros_like(gate[i + 1 :])]))
            weight = score.exp() * stack(kept).permute(2, 0, 1)  # (nh, T, T)
            x = x + block.proj(cat([*F.normalize(weight, 1, -1) @ v], 1))
            x = x + block.down(block.up(block.ln_2(x)).clamp(min=0) ** 2)
        x = gpt.ln_out(x)[-n - 1 : -1]
        p = gpt.logits(x).softmax(1)  # (n, V)
        logp = p[arange(n), ids[-n:]].log()
        found.append(stack([logp, gpt.value(x.detach()), torch.special.entr(p).sum(1)]))
    return cat(found, 1)


@given(policies, turn_counts, seeds, sampled_from([1, 64, 200, 8192]), integers(0, 4))
@example(keep_last, [6, 4, 5, 6], 0, 64, 1)
def test_sampler_learner_and_dense_attention_turn_by_turn_agree_with_gradients(
        policy, turns, seed, budget, split):
    gpt = talkative()
    trajs = play(gpt, policy, turns, seed)
    before, halves = repr(trajs), (range(split), range(split, len(trajs)))
    fast = cat([learned(gpt, trajs, budget=budget, which=half) for half in halves], 1)
    assert repr(trajs) == before  # make_rows() leaves its input as it was
    slow = dense(gpt, trajs)
    assert far(fast, slow) < 1e-10 and far(acted(trajs), slow[:2]) < 1e-10
    grads = [torch.autograd.grad(found.sin().sum(), [*gpt.parameters()]) for found in (fast, slow)]
    assert max(map(far, *grads)) < 1e-9 < grads[0][0].norm()


@given(policies, turn_counts, seeds)
@example(keep_last, [6, 4], 0)
def test_rows_show_each_token_its_context_and_train_it_once(policy, turns, seed):
    trajs = play(talkative(), policy, turns, seed)
    shown = {}
    for rows in make_rows(trajs, 64):
        for (b, t), place in zip(rows.loss_mask.nonzero().tolist(), rows.place.tolist()):
            assert place not in shown
            shown[place] = rows.ids[b, :t].tolist(), rows.ids[b, t].item()
    want = [pair for traj in trajs for pair in contexts(traj, policy)]
    assert [shown[place] for place in sorted(shown)] == want


@given(policies, lists(integers(2, 4), min_size=2, max_size=3), seeds, sampled_from([6.0, -99.0]))
@example(keep_last, [2, 4, 3], 1, -99.0)
def test_an_episode_is_the_same_whatever_runs_beside_it(policy, turns, seed, ends):
    gpt = talkative(ends=ends)
    together = play(gpt, policy, turns, seed)
    for i, traj in enumerate(together):
        alone = play(gpt, policy, turns, seed, slice(i, i + 1))
        for turn, same in zip(traj.turns, alone[0].turns, strict=True):
            assert (turn.context, turn.written) == (same.context, same.written)
        lengths = {len(turn.written) for turn in traj.turns}
        assert ends > 0 or lengths == {2 * (12 + traj.env.n_questions)}  # all are cut off


@parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_peak_and_dependency_count_what_each_token_looked_back_on(policy):
    env = ComposedQA(5, seed=1)
    mem1.play_history(env, policy, 2)
    traj = expert_rollout(env, policy)
    looked = [len(context) - len(traj.prompt) for context, _ in contexts(traj, policy)]
    assert traj.peak == max(looked) + 1 and traj.dependency == sum(looked) + len(looked) / 2
    unpruned = ppo.mean_over_episodes([traj])["unpruned"]
    is_full = policy in (keep_all, POLICIES["full-list"])
    assert unpruned == traj.peak if is_full else unpruned > traj.peak


def test_similar_keeps_the_turns_most_like_the_query_and_window_the_last_three():
    turns = [Turn([], [*state, QUERY, *said, END], [INFO, *found]) for state, said, found in (
        ([], [7], [8]), ([], [7], []), ([5], [9, 7], []), ([9, 5], [], []), ([9, 5], [7, 8], []))]
    assert mem1.keep_similar(turns) == keep_all([turns[0], turns[2], turns[4]])
    assert mem1.keep_window(turns) == keep_all(turns[2:])


@given(lists(integers(1, 40), min_size=1, max_size=9), integers(1, 200))
@example([9, 9, 9], 27)
@example([9, 9, 9], 26)
def test_rows_hold_no_more_tokens_than_the_budget_unless_it_is_one_row(lengths, budget):
    trajs = [Trajectory(None, [0], [Turn([0], [1] * n)]) for n in lengths]
    shapes = [rows.ids.shape for rows in make_rows(trajs, budget)]
    assert all(B * T <= budget or B == 1 for B, T in shapes)
    for (B, T), (_, next_T) in itertools.pairwise(shapes):  # none is split without need
        assert (B + 1) * T > budget and T >= next_T


def test_memory_is_the_share_of_the_answers_found_that_the_state_holds():
    env = ComposedQA(3, hops=(1, 1), seed=1)
    (a, x), (b, y), (c, z) = env.golds
    queries = [" " + path[0].rpartition(" ")[0] for path in env.paths.values()]
    states = ["", f" ; {a} {x}", f" ; {a} {x} {b} jelo", f" ; {b} {y} {c} {z}"]
    traj = Trajectory(env, prompt_ids(env))
    for written in zip(states, [*queries, queries[0]]):
        state, query = map(ENC.encode_ordinary, written)
        traj.add_turn(traj.next_context(keep_last), [*state, QUERY, *query, END])
    beginnings = [Trajectory(env, traj.prompt, traj.turns[:t]) for t in range(1, 5)]
    assert [*map(mem1.memory_recall, beginnings)] == [(0, 0), (1, 1), (3, 2), (6, 4)]
    assert ppo.mean_over_episodes([traj])["memory"] == approx(4 / 6)


def test_model_cache_and_sampling_make_no_tensor_on_another_device(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    with torch.device("meta"):
        gpt, one, uniform = GPT(GPTConfig(9)), ones(3, dtype=torch.long), rand(3)
    cache = Cache(gpt, 3)
    cache.keep_prompt()
    cache.rollback([0, 2])
    cache.reserve(1, one)
    x = gpt(one[:, None], cache)[:, 0]
    assert mem1.sample(gpt.logits(x), uniform)[0].is_meta
    assert gpt.value(gpt(one[None])).is_meta
    with pytest.raises(RuntimeError):  # control: a tensor that is elsewhere
        mem1.sample(gpt.logits(x), rand(3))


def test_in_bfloat16_sampler_and_learner_agree_on_long_contexts():
    gpt = talkative(ends=-9.0).float()
    for block in gpt.blocks:  # one head forgets fast: ages get large
        block.gate.bias.data[0] = 0.0
    world = AnyWorld(12, 0, 16, history=2)
    gpt.config.bfloat16 = True
    (traj,) = rollout(gpt, [world], keep_all, [world.rng])
    assert traj.peak > 512
    found = learned(gpt, [traj])
    assert found.dtype == torch.float32 and far(found[:2], acted([traj])) < 0.05
    gpt.config.bfloat16 = False
    assert far(found, learned(gpt, [traj])) > 0.05  # control


# --- Tokens, parser, environment

odd = [*mem1.TAGS, *"</>IS \n\x00#é\ud800", " jelo", "</info>"]
texts = one_of(text(), lists(sampled_from(odd)).map("".join))


@given(texts)
def test_any_text_from_outside_round_trips_and_none_yields_a_tag(said):
    world = AnyWorld(2, 0)
    world.prompt, world.words = said, lambda: said
    traj = Trajectory(world, prompt_ids(world))
    traj.add_turn(traj.next_context(keep_last), [])
    for first, *ids in traj.prompt, traj.turns[0].info:
        assert first in TAG_IDS and not set(ids) & set(TAG_IDS)
        assert ENC.decode(ids) == said.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@given(lists(sampled_from([200, 300, QUERY, ANSWER, END, IS]), max_size=6))
@example([ANSWER, END, 300])
def test_the_parser_takes_anything_loses_nothing_and_agrees_with_a_regex(ids):
    kind, state, said = mem1.parse(ids)
    letters = "".join({QUERY: "q", ANSWER: "a", END: "e", IS: "i"}.get(token, ".") for token in ids)
    whole = re.fullmatch(r"\.*([qa])\.*e", letters)
    assert kind == ({"q": "query", "a": "answer"}[whole[1]] if whole else "malformed")
    assert state == [token for token in ids[: len(state)] if token not in TAG_IDS]
    assert ids[len(state) : len(state) + 1] == [token for token in ids if token in TAG_IDS][:1]
    assert not whole or said == ENC.decode(ids[len(state) + 1 : -1])


@parametrize("name", POLICIES)
def test_the_demonstrator_answers_all_questions_under_every_policy(name):
    def answered(n, episodes, rng=None, max_turns=None):
        tasks = [ComposedQA(n, (1, 3), seed, max_turns) for seed in range(episodes)]
        for env in tasks:
            expert_rollout(env, POLICIES[name], rng)
            assert env.cause == "answered"
        return [env.em for env in tasks]

    for n in 2, 5, 16, 40:
        assert answered(n, 3) == [n] * 3
    assert np.mean(answered(16, 20, max_turns=10)) < 12
    # A random note is one of six names in view: one in six is right. The last answer always is.
    assert np.mean(answered(16, 60, rng=default_rng(0))) == approx(1 + 15 / 6, abs=0.5)


some_seen = ("<IS>|<query>|<answer>|<end>|<info>|;|:|::|.|left=3|left=1|answer|#64|#65|#9|jelo|"
             "milu|pupil|heir|jelo pupil jero|#64 : jelo pupil #65|<query>(( x").split("|")


@given(lists(one_of(sampled_from(some_seen), text(max_size=4))), booleans())
@example(["; #64 jero #65 veba<query> foo bar<end><info> left=3"], False)
def test_the_demonstrator_has_something_to_write_whatever_it_sees(seen, fresh):
    prompt = " #64 : jelo pupil #65 :: milu pupil neighbour ."
    turn = envs.oracle_notes(prompt, " ".join(seen), fresh)
    for state, kind, said in turn, envs.random_notes(default_rng(0), " ".join(seen), *turn):
        form = {"query": r"\S+ .+", "answer": r"#\d+|((^| )#\d+ \S+)*"}[kind]
        assert "<" not in state + said and re.fullmatch(form, said)


@given(lists(names, min_size=1), lists(tuples(integers(0, 6), lists(names, max_size=2))))
def test_scores_equal_those_of_an_independent_scorer(golds, said):
    em = 0
    for index, gold in enumerate(golds):
        mine = next((entry for i, entry in said if i == index), [])
        em += mine == [gold]
    answer = " , ".join(f"#{i} {' '.join(entry)}" for i, entry in said)
    pairs = [(f"#{i}", gold) for i, gold in enumerate(golds)]
    assert envs.score(f"so: {answer}!", pairs) == em


def test_an_exercise_can_be_solved_from_its_text_and_trains_its_answers_alone():
    for seed in range(300):
        asked, whole = envs.exercise_text(keyed_rng(0, Stream.PRIMER, 5, seed), 12)
        ((ids, loss_mask),) = mem1.merged_turns(mem1.exercise(train.Config(), 5, seed, 12))
        assert ENC.decode(ids) == asked + "".join(part for part, _ in whole)
        trained = "".join(part for part, is_trained in whole if is_trained)
        assert ENC.decode([*itertools.compress(ids, loss_mask)]) == trained
        (skill, _), *parts, _ = whole
        assert skill != " edit" or asked.split()[-1] in parts[0][0].split()
        assert skill != " edit" or asked.count(":") == parts[0][0].count(":") + 1  # one hop done
        for (key, _), (wanted, _) in zip(parts[::2], parts[1::2]):
            assert (f"{wanted}," if skill == " note" else key + wanted) in asked  # note: any fact


def test_training_draws_from_no_key_twice_and_tests_from_other_keys(tmp_path, monkeypatch):
    keys, policies = [], set()
    real = mem1.visible_context
    monkeypatch.setattr(mem1, "visible_context", lambda *args: policies.add(args[1]) or real(*args))
    monkeypatch.setattr(np.random, "default_rng", lambda k: keys.append((*k,)) or default_rng(k))
    assert run(*TINY, tmp_path, "--seed", 3, "--agents", "window") == (0, [])
    theirs = [(evaluation.SEED, Stream.VALID), (evaluation.SEED, Stream.TEST)]
    drawn = [key for key in keys if key[:2] not in theirs]  # for training
    assert len(drawn) == len({*drawn}) > 100 and {key[0] for key in drawn} == {3}
    tested = [key for key in keys if key[1] == Stream.TEST]
    assert {key[3:] for key in tested} == {*itertools.product(range(3), (0, 2))}  # episode, what
    assert keys.index(tested[0]) > keys.index(drawn[-1])  # validation is not on test episodes
    assert policies == {mem1.keep_window}  # of history, demonstrations, PPO, validation, table


# --- Training tasks: pieces of longer ones


@given(sampled_from([*POLICIES.values()]), integers(0, 4), booleans(), seeds)
@example(keep_last, 4, True, 0)
@example(keep_last, 4, False, 0)
def test_a_piece_begins_where_the_whole_task_reaches_its_question(policy, before, random, seed):
    rng, same_rng = [default_rng(seed) if random else None for _ in range(2)]
    env, whole = ComposedQA(6, seed=seed), ComposedQA(6, seed=seed)
    mem1.play_history(env, policy, before, rng)
    first = Trajectory(env, prompt_ids(env)).next_context(policy)

    # The whole task reaches a question in the turn whose query is its first hop.
    turns = expert_rollout(whole, policy, same_rng).turns
    hop = " " + whole.paths[whole.golds[before][0]][0].rpartition(" ")[0]
    start = [mem1.parse(turn.written)[2] for turn in turns].index(hop)
    assert env.history == turns[:start]
    assert first == turns[start].context


@parametrize("flags", [dict(), dict(around=0), dict(demos="oracle")])
@parametrize("agent", POLICIES)
def test_training_asks_for_two_answers_after_a_history_of_the_agents_own_kind(agent, flags):
    cfg, tasks, listed, right, ends = train.Config(**flags), [], [], [], []
    sizes, befores = set(), []
    for stream, i in itertools.product((Stream.DEMOS, Stream.PPO), range(60)):
        env = train.training_task(cfg, agent, stream, 0, i)
        golds = envs.world(cfg.env)(env.n_questions, cfg.hops, [0, stream, 0, i, 0]).golds  # of all
        for turn in env.history:
            entries = re.findall(envs.ENTRY, ENC.decode(turn.state))
            listed.append(len(entries))
            right += [entry in golds for entry in entries]
        first, *_ = expert_rollout(env, POLICIES[agent]).turns
        assert f"{env.golds[0][0]} :" in ENC.decode(first.written)  # its own first question
        assert [*env.paths] == [index for index, _ in env.golds]
        sizes.add((stream, len(env.golds)))
        befores.append(golds.index(env.golds[0]))
        assert env.turn == env.max_turns or env.golds[-1] == golds[-1]  # just enough turns
        assert stream == Stream.DEMOS or env.em == env.n_objectives
        ends.append(env.golds[-1] == golds[-1])
        tasks.append(env)

    longest = max(env.n_questions for env in tasks)
    assert sizes == {(Stream.DEMOS, 1), (Stream.DEMOS, 2), (Stream.PPO, 2)}
    assert max(befores) == cfg.around
    assert 100 < max(env.max_turns for env in tasks) <= 2 * cfg.most_questions + 2
    if cfg.around:
        assert len(listed) > 100 and longest > 40 and 0.5 < np.mean(ends) < 0.8
        assert (max(listed) == 1) == (agent == "full")  # only it lists nothing but the new answer
        is_random = agent == "mem1" and cfg.demos == "random"
        assert np.mean(right) < 0.3 if is_random else all(right)
    else:
        assert not listed and longest == 2 and all(ends)


# --- PPO


def test_what_is_recorded_is_the_probability_with_which_the_token_was_drawn():
    n, logits = 20000, randn(1, 7, generator=torch.manual_seed(0)).double() * 2
    ids, logp = mem1.sample(logits.expand(n, -1), (arange(n).double() + 0.5) / n)
    share = torch.bincount(ids) / n
    assert far(logp.exp(), share[ids].double()) < 1.5 / n
    assert mem1.sample(logits) == (logits.argmax(), logits.log_softmax(-1).max())  # greedy


def slow_gae(r, v, gamma, lam):
    """Oracle: the advantages of one episode as the double sum of their definition."""
    delta = r + gamma * F.pad(v[1:], (0, 1)) - v
    k = arange(len(r)).double() - arange(len(r))[:, None]
    return ((gamma * lam) ** k).triu() @ delta


@given(turn_counts, floats(0, 1), floats(0, 1), seeds)
@example([3, 2], 0.9, 0.8, 0)
def test_gae_is_the_double_sum_of_its_definition(lengths, gamma, lam, seed):
    torch.manual_seed(seed)
    pairs = [randn(2, n).double() for n in lengths]
    r, v = cat(pairs, 1)
    adv, ret = ppo.gae(r, v, ppo.segment_ends(lengths, "cpu"), gamma, lam)
    assert far(adv, cat([slow_gae(*pair, gamma, lam) for pair in pairs])) < 1e-12
    assert far(ret - adv, v) < 1e-12


ALL_ON = train.Config(device="cpu", ppo_batch=5, exercises=3, primer_longest=3, micro_batch=60,
                      gamma=0.9, lam=0.8, kl_coef=0.1)  # every term counts
sgd = functools.partial(torch.optim.SGD, lr=0.3)


def descend(gpt, loss):
    """One step by hand. Returns the norm of the gradient."""
    gpt.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), ALL_ON.grad_clip)
    sgd(gpt.parameters()).step()
    return norm.item()


def test_imitation_equals_an_independent_computation():
    gpt, twin = talkative(), talkative()
    trajs = [mem1.exercise(ALL_ON, 0, 0, 4), expert_rollout(ComposedQA(2), keep_last)]
    row = train.imitate(gpt, sgd(gpt.parameters()), make_rows(trajs, 60), ALL_ON)
    descend(twin, loss := -dense(twin, trajs)[0].mean())
    assert max(map(far, gpt.parameters(), twin.parameters())) < 1e-7
    assert row["loss"] == approx(loss.item(), abs=1e-6)


def slow_update(gpt, reference, cfg, step):
    """Oracle: ppo.update() by the definitions, nothing packed. Returns what it logs."""
    rngs = [keyed_rng(cfg.seed, Stream.PPO, step, i, 2) for i in range(5)]
    trajs = rollout(gpt, worlds(), keep_last, rngs)
    old_logp, old_value, _ = dense(gpt, trajs).detach()
    to_ref = old_logp - dense(reference, trajs)[0].detach()
    r = -cfg.kl_coef * to_ref
    sizes, adv = [traj.n_trained for traj in trajs], []
    for traj, its_r, its_value in zip(trajs, r.split(sizes), old_value.split(sizes)):
        its_r[-1] += traj.env.em / traj.env.n_objectives
        adv.append(slow_gae(its_r, its_value, cfg.gamma, cfg.lam))
    adv, episode = cat(adv), arange(5).repeat_interleave(tensor(sizes))
    ret = adv + old_value
    white = (adv - adv.mean()) / (adv.var(correction=0) + 1e-8).sqrt()

    stats = []
    for epoch in range(cfg.ppo_epochs):
        for chosen in ppo.minibatches(cfg, step, epoch):
            logp, value, entropy = dense(gpt, [trajs[e] for e in chosen])
            in_batch = torch.isin(episode, tensor(chosen))
            ratio = (logp - old_logp[in_batch]).exp()
            gain = torch.minimum(ratio * white[in_batch], ratio.clamp(0.8, 1.2) * white[in_batch])
            number = cfg.demos_steps + step * cfg.ppo_epochs * cfg.ppo_minibatches + len(stats)
            loss = ((value - ret[in_batch]).square() / 2 - gain).mean()
            loss -= cfg.primer_coef * dense(gpt, ppo.exercises(cfg, number))[0].mean()
            norm = descend(gpt, loss)
            stats.append(stack([ratio - 1 - ratio.log(), (ratio - 1).abs() > 0.2, entropy]))
    means = dict(zip(("kl", "clip", "ent"), cat(stats, 1).mean(1).tolist()))
    return dict(means, ref=to_ref.mean().item(), ev=1 - (adv.var() / ret.var()).item(), norm=norm,
                tokens=cfg.ppo_epochs * len(adv))


@parametrize("epochs, cap, step", [(2, 27, 0), (2, 2, 3), (1, 1, 1)])
def test_one_whole_update_equals_an_independent_computation(epochs, cap, step):
    cfg = dataclasses.replace(ALL_ON, ppo_epochs=epochs, ppo_minibatches=epochs)
    gpt, twin, reference = [talkative(seed) for seed in (0, 0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mem1, "turn_cap", lambda env: cap)
        row = ppo.update(gpt, sgd(gpt.parameters()), reference, worlds(), keep_last, cfg, step)
        want = slow_update(twin, reference, cfg, step)
    assert {name: row[name] for name in want} == approx(want, abs=1e-9)
    assert max(map(far, gpt.parameters(), twin.parameters())) < 1e-9
    assert 0 < row["gap"] < 1e-10
    for config in cfg, train.Config():  # 5 episodes, 128
        assert sorted(sum(ppo.minibatches(config, 0, 1), [])) == [*range(config.ppo_batch)]
    lanes = np.sort(np.array(ppo.minibatches(train.Config(), 0, 1)) % 8)  # (2, 64)
    assert (lanes == np.arange(64) // 8).all()  # each of 8 processes has 8 of each minibatch
    # Before the first update the ratio is one; later it is clipped. The gradient always is.
    assert (row["clip"] > 0) == (epochs > 1) and row["norm"] > 1


def train_a_little(rank, world_size, folder):
    """Two steps of imitation and of PPO in one of the processes; leaves weights and log."""
    gpt = learner = talkative()
    if world_size > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world_size)
        learner = torch.nn.parallel.DistributedDataParallel(gpt)
    cfg = dataclasses.replace(ALL_ON, ppo_minibatches=3)
    for step in range(2):
        trajs = [mem1.exercise(cfg, step, 0, 4), expert_rollout(ComposedQA(2), keep_last)]
        row = train.imitate(learner, sgd(gpt.parameters()), make_rows(trajs[rank::world_size]), cfg)
        mine = worlds(seed=step)[rank::world_size]
        row |= ppo.update(learner, sgd(gpt.parameters()), talkative(1), mine, keep_last, cfg, step)
    torch.save([[*gpt.parameters()], row], folder / f"{rank} of {world_size}")
    if world_size > 1:
        dist.barrier()  # nobody leaves while another waits for it
        dist.destroy_process_group()


def test_the_number_of_processes_changes_nothing(tmp_path):
    train_a_little(0, 1, tmp_path)
    torch.multiprocessing.spawn(train_a_little, (2, tmp_path), nprocs=2)
    params, row = torch.load(tmp_path / "0 of 1")
    for name in "0 of 2", "1 of 2":
        same_params, same_row = torch.load(tmp_path / name)
        assert max(map(far, params, same_params)) < 1e-9
        assert row == approx(same_row, rel=1e-5, abs=1e-9)
    assert far(params[0], talkative().emb.weight) > 1e-3  # control


# --- Runs, and what is written about them

TINY = ("--preset debug --env qa --around 4 --agents mem1 --device cpu --primer-steps 4 "
        "--primer-batch 8 --demos-steps 4 --demos-batch 8 --ppo-steps 4 --ppo-batch 6 "
        "--ppo-minibatches 2 --eval-every 2 --valid-episodes 2 --eval-episodes 3 --out").split()
# (Its agents write garbage: one turn, reward 0.)


def run(*flags, main=train.main):
    """train.py in this process: (exit code, lines on stderr)."""
    with redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as end:
        sys.exit(main([*map(str, flags)]) or 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return end.value.code, said.getvalue().splitlines()


def logged(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def outcome(out):
    """What a run leaves, times left out."""
    written = (out / "metrics.jsonl").read_text() + (out / "results.json").read_text()
    return re.sub(r'"(minutes|tok_s|time|commit)": [^,}\n]+', "", written), weights(out)


def weights(out):
    """A hash of each model's weights, so that a failure does not print them all."""
    models = evaluation.load_checkpoint(out)["models"]
    return {k: hash(str([w.tolist() for w in m["weights"].values()])) for k, m in models.items()}


class Trap:
    def __reduce__(self):  # what a malicious checkpoint would do
        return os.abort, ()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, with checkpoints in its directory that fit no run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(*TINY, out) == (0, [])
    state = evaluation.load_checkpoint(out)
    wide, unknown = [dict(state["config"], **change) for change in (dict(n_embd=96), dict(x=1))]
    misfits = dict(wide=dict(state, config=wide), unknown=dict(state, config=unknown),
                   early=dict(state, models={}), foreign={}, malicious=Trap())
    for name, content in misfits.items():
        (out / name).mkdir()
        torch.save(content, out / name / "checkpoint.pt")
    return out


def test_the_debug_preset_finds_memory_by_reward(tmp_path):
    assert run(*"--preset debug --agents mem1 --device cpu --out".split(), tmp_path) == (0, [])
    for name, before, after in ("memory", 0.5, 0.9), ("em", 1.4, 1.7):
        values = [row[name] for row in logged(tmp_path) if row["stage"] == "ppo"]
        assert np.mean(values[:3]) < before and np.mean(values[-3:]) > after


def test_a_run_leaves_metrics_and_the_results_of_its_agents_greedy_and_sampled(finished, capsys):
    steps = [(row["stage"], row["step"]) for row in logged(finished)]
    first, *_, last = [row["ref"] for row in logged(finished) if row["stage"] == "ppo"]
    assert abs(first) < 1e-6 < abs(last)  # the reference is the imitated model, and stays so
    assert steps == [*itertools.product(("primer", "demos", "ppo"), (1, 2, 3, 4))]
    table = json.loads((finished / "results.json").read_text())
    assert [*table] == ["mem1-demos", "mem1-demos-sampled", "mem1", "mem1-sampled", "meta"]
    (cfg, models), written = evaluation.load_run(finished), []
    for name in "mem1", "mem1-sampled":
        agent, policy, is_sampled = evaluation.load_method(models, name, "cpu")
        trajs = evaluation.play(agent, policy, cfg, 1, range(3), Stream.TEST, is_sampled)
        for key in "peak", "dependency":
            assert table[name]["1"][key] == np.mean([getattr(traj, key) for traj in trajs])
        written.append([traj.turns[0].written for traj in trajs])
    assert written[0] != written[1]
    flags = "--show 1 --objectives 1 2 --device cpu".split()
    assert run(finished, *flags, main=evaluation.main) == (0, [])
    assert capsys.readouterr().out.count("2 objectives\n") == 2  # of both agents


def test_data_made_ahead_by_workers_that_get_a_signal_are_the_same(finished, tmp_path, monkeypatch):
    def log(run, kind, agent, step, row, log=train.log):
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        if step == 3:  # both have made a batch, so both are set up
            workers[0].terminate()
            os.kill(workers[1].pid, signal.SIGINT)
        log(run, kind, agent, step, row)

    monkeypatch.setattr(train, "log", log)
    assert run(*TINY, tmp_path, "--workers", 2) == (0, [])
    assert run("--resume", "--out", tmp_path, "--workers", 0) == (0, [])  # as on a smaller machine
    assert outcome(tmp_path) == outcome(finished)


@parametrize("how, calls", [
    (signal.SIGINT, 9), (signal.SIGTERM, 23), (OSError, 1), (OSError, 18), (OutOfMemoryError, 12),
    *((GeneratorExit, calls) for calls in range(0, 50, 1 if THOROUGH else 16))])  # as by SIGKILL
def test_a_run_ended_anywhere_and_resumed_is_the_uninterrupted_one(finished, tmp_path, how, calls):
    made, out = itertools.count(), tmp_path / "a b"

    def strike(*args, real):
        call = next(made)
        if call >= calls and how in (GeneratorExit, OSError, OutOfMemoryError):
            raise how("no space left")
        if call == calls:  # a second signal would end the tests
            signal.raise_signal(how)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, suppress(GeneratorExit):
        for owner, name in (os, "fsync"), (os, "replace"), (ppo, "clip_and_step"):
            patch.setattr(owner, name, functools.partial(strike, real=getattr(owner, name)))
        code, lines = run(*TINY, out)
        assert (code, len(lines)) == ((128 + how, 0) if how in train.SIGNALS else (1, 1))
        assert not lines or (f"--out '{out}' --resume" in lines[0]) == any(out.glob("*.pt"))
    (out / "metrics.jsonl").open("a").write('{"stage": "pri')  # a power cut: half a line
    again = ["--resume", "--out"] if list(out.glob("*.pt")) else TINY
    assert run(*again, out) == (0, [])
    assert outcome(out) == outcome(finished)  # bit for bit


def test_ppo_starts_from_an_imitated_agent_and_ends_as_in_the_whole_run(finished, tmp_path):
    assert run(*TINY, tmp_path, "--start", finished) == (0, [])
    assert weights(tmp_path) == {k: v for k, v in weights(finished).items() if k != "primer"}


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "whiten", lambda adv: adv * np.nan)
    code, (line,) = run(*TINY, tmp_path)
    assert code == 1 and "not finite" in line


@given(integers(0, 10**9), booleans())
def test_a_damaged_checkpoint_is_refused_in_one_line(finished, at, is_cut_off):
    path = finished.parent / "checkpoint.pt"
    data = bytearray((finished / "checkpoint.pt").read_bytes())
    at %= len(data)
    data[at] ^= 1 << at % 8
    path.write_bytes(data[:at] if is_cut_off else data)
    try:
        assert weights(path.parent) == weights(finished)  # a bit that nothing depends on
    except ValueError as error:
        assert re.fullmatch(r"[^\n]*checkpoint.pt[^\n]*", str(error))


@parametrize("bad", re.split("; |\n", """--objectiv 3: unrecognized; --preset huge: invalid choice
--seed -1: seed; --ppo-lr fast: invalid float; --objectives 3: objectives; --n-embd 51: n-embd
--hops 1 9: hops; --hops 1 1 2: hops; --objectives 4 2: objectives; --ppo-batch 0: ppo-batch
--start /none: No such file; --start {} --n-embd 96: size; --agents nobody: invalid choice
--env mars: env; --env shop: --around 0; --env count: --demos oracle; --around 40: around
--eval-objectives 500: eval-objectives; --preset cpu --ppo-minibatches 129: ppo-minibatches
--nproc 999: nproc; --out /proc/run: /proc/run; --hops 1 1 --objectives 1 81: 1 to 80
--around x: around; --gamma 1.1: gamma; --clip 1: clip; --ppo-lr 2: ppo-lr; --ppo-lr nan: ppo-lr
--workers 9999999: workers; --out "": a directory; --out {}: holds a run; --agents full full: once
--resume --out {} --seed 7: drop the flag; --resume --out {}/none: checkpoint.pt
--resume --out {}/unknown: another train.py; --resume --out {}/wide: size; {}/foreign: contents
{}/malicious: checkpoint.pt; {}/early: no agent; {} --episodes 0: --episodes; {} --show 0: --show
{} --agents nobody: --agents; {} --objectives 99: --objectives; {} --env nowhere: --env"""))
def test_bad_flags_and_runs_that_they_do_not_fit_get_one_line_and_an_exit_code(finished, bad):
    flags, words = bad.format(finished).rsplit(": ", 1)
    base = [] if bad.startswith(("{}", "--resume")) else [*TINY, finished / "none"]
    main = evaluation.main if bad.startswith("{}") else train.main
    code, (line,) = run(*base, *shlex.split(flags), main=main)
    assert code == (1 if words == "/proc/run" else 2) and words in line
    assert "to continue" not in line  # nothing was begun


def test_a_run_that_another_process_writes_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # means nothing without a launcher
    with train.locked(tmp_path):
        code, (line,) = run(*TINY, tmp_path)
        assert code == 1 and "another process is writing this run" in line
        assert not list(tmp_path.glob("*.pt"))
    train.locked(tmp_path).close()  # control: now it is free


FLAGS = [train.flag(f.name) for f in dataclasses.fields(train.Config)]
VALUES = ("0 1 2 3 7 -1 1000 100000000000000000000 0.5 1e400 nan x mem1 full qa web shop list "
          "debug gpu cpu cuda auto / /dev/null envs.py #64 é a \udcff").split()


@settings(max_examples=5 * EXAMPLES)
@given(lists(tuples(sampled_from(FLAGS), lists(sampled_from(VALUES), max_size=3)), max_size=3))
def test_any_command_line_is_taken_or_refused_in_one_line(flags):
    words = [word for flag, values in flags for word in (flag, *values)]
    found, lines = run(*words, main=train.parse_arguments)  # found: a Config, or 2
    if found == 2:
        assert len(lines) == 1
    else:  # what is taken can be played
        assert train.training_task(found, "mem1", Stream.DEMOS, 0, 0).prompt
        for n in found.eval_objectives:
            assert envs.world(found.env)(n, found.hops, [0]).prompt


@pytest.mark.skipif(os.cpu_count() < 2, reason="--nproc 2 needs two cores")
def test_a_killed_worker_ends_all_processes_in_one_line(tmp_path):
    flags = *TINY, str(tmp_path), *"--ppo-steps 999 --nproc 2 --play-batch 1".split()
    launcher = subprocess.Popen([sys.executable, "train.py", *flags], cwd=HERE, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert any(line.startswith("ppo") for line in launcher.stdout), launcher.stderr.read()
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, said = launcher.communicate(timeout=200)
    assert launcher.returncode > 0 and said.count("\n") == 1 and "--resume" in said


@parametrize("module", [envs, mem1, ppo, train, evaluation])
def test_the_examples_in_docstrings_are_right(module):
    assert doctest.testmod(module, raise_on_error=True).attempted > 0


def test_what_the_readme_names_exists_and_its_table_is_what_was_measured():
    readme, more = [(HERE / f"{folder}README.md").read_text() for folder in ("", "experiments/")]
    code = "".join(path.read_text() for path in [*HERE.glob("*.py"), *HERE.glob("exp*/*.py")])
    tests = re.findall(r"`(test_\w+?)(?:_?\.\.\.)?`", readme)
    assert tests and all(f"def {name}" in code for name in tests)
    flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", readme + more)
    assert {*flags} <= {*FLAGS, *re.findall(r'"(--[a-z-]+)"', code)}
    methods = json.loads((HERE / "assets/results.json").read_text())["methods"]
    assert tables.readme_table(methods) in readme


# --- The test of the tests: a known bug is put back in, and a test must fail

MUTANTS = [  # function, a snippet of it, what replaces the snippet, beginning of the test's name
    ("model.Block.forward", "is_causal=attn_mask is None", "is_causal=False", "sampler"),
    ("model.Cache.reserve", "<= self.slots[:, None,", ">= 0 * self.slots[:, None,", "sampler"),
    ("model.Cache.rollback", "self.prompt_tail[:,", "self.tail[:,", "sampler"),
    ("model.Cache.extend", "+ tail[:, -1:, C2:]", "", "sampler"),
    ("mem1.predict", "x[:, :-1]", "x[:, 1:]", "sampler"),
    ("mem1.rollout_batch", "len(fed) - 1", "len(fed)", "sampler"),
    ("mem1.merged_turns", "[False]", "[True]", "rows_show"),  # read tokens are trained
    ("mem1.merged_turns", "or turn.context[: len(rows[-1][0])] !=", "or None is", "rows_show"),
    ("mem1.Trajectory.add_turn", "Turn(context, written", "Turn(context, ENC.encoding.encode("
     "ENC.decode(written), allowed_special='all')", "an_episode"),  # tokens pass through text
    ("mem1.sample", "logps.exp()", "(logps / 0.9).exp()", "what_is_recorded"),
    ("mem1.predict", "x.detach()", "x", "one_whole"),  # the critic changes what it reads
    ("mem1.play_history", "(env, policy, rng,", "(env, keep_all, rng,", "a_piece_begins"),
    ("mem1.memory_recall", "found.intersection(", "found.union(", "memory"),
    ("envs.ComposedQA.take_piece", "self.golds[first : first + n]", "self.golds", "training_asks"),
    ("ppo.update", "in trajs for r", "in trajs[::-1] for r", "one_whole"),  # another's reward
    ("ppo.update", "term).sum() / n_tokens", "term).mean()", "one_whole"),
    ("ppo.update", "whiten(adv)", "whiten(adv); ret = adv + old_value", "one_whole"),
    ("ppo.update", "predict(reference,", "predict(raw,", "one_whole"),
    ("ppo.gae", "if end[t]", "if t == len(r) - 1", "gae"),  # advantages cross episodes
    ("ppo.policy_loss", "torch.min(ratio * adv,", "(", "one_whole"),  # clips in both directions
]


@contextmanager
def mutated(where, old, new):
    """A function runs with one snippet of its source replaced."""
    module, *path = where.split(".")
    function = inspect.unwrap(functools.reduce(getattr, path, globals()[module]))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{where} has changed: it does not have `{old}` once"
    made = {}
    exec(source.replace(old, new), function.__globals__, made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "__code__", inspect.unwrap(made[path[-1]]).__code__)
        yield


@parametrize("where, old, new, by", MUTANTS)
def test_every_mutant_is_caught(where, old, new, by):
    (test,) = [value for key, value in globals().items() if key.startswith(f"test_{by}")]
    parameters = getattr(test, "pytestmark", [])
    with mutated(where, old, new), pytest.raises(AssertionError):
        for case in itertools.product(*[mark.args[1] for mark in parameters]):
            values = [part if isinstance(part, tuple) else (part,) for part in case]
            test(*itertools.chain(*values))  # one for each name in parametrize
