"""test_mem1.py: what must be true, each test a sentence.      python -m pytest -q
                                                            PROFILE=thorough python -m pytest -q

Oracles are written differently from the code: a re-encoding of every context token by token, a double sum,
an independent scorer. Each property has a positive control: something that must change, does.
"""
import collections
import contextlib
import dataclasses
import datetime
import doctest
import fcntl
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

import envs
import eval as evaluation
import mem1
import model as model_py
import ppo
import train
from mem1 import ANSWER, END, ENC, INFO, IS, POLICIES, QUERY, TAG_IDS, TASK, Branch, Trajectory, Turn, demonstrate, evaluate, pack, parse, recorded, rollout
from model import GPT, Cache, GPTConfig

settings.register_profile("mem1", deadline=None, derandomize=True, database=None, print_blob=True, max_examples=25)
settings.register_profile("thorough", settings.get_profile("mem1"), max_examples=250)
settings.load_profile(os.environ.get("PROFILE", "mem1"))
FEWER, MORE = (settings(max_examples=settings.default.max_examples * n // 5) for n in (2, 12))
THOROUGH = os.environ.get("PROFILE") == "thorough"
torch.set_num_threads(1)

# ----------------------------------------------------------------------------------------------
# A world in which whatever is written is taken, so that random weights play many turns


class AnyWorld:
    """Takes any action for `turns` turns, and answers each with a random text."""
    n_objectives, em, f1, cause, width = 1, 0, 0.0, None, 1

    def __init__(self, turns, seed):
        self.left, self.done, self.rng = turns, False, np.random.default_rng(seed)
        self.gains = [0.25 * (t + 1) for t in range(turns)]
        self.prompt = self.words(1, 5)

    def words(self, low, high):
        return "".join(f" {w}" for w in self.rng.choice(envs.WORDS, self.rng.integers(low, high + 1)))

    def step(self, kind, text):
        self.left -= 1
        self.done = self.left == 0
        return self.words(0, 6)


def talkative(dtype=torch.float64, seed=0, **kwargs):
    """A GPT of random weights, all of them far from their initial structure, that likes to end its turns."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(ENC.n_vocab, **{**dict(n_layer=2, n_head=2, n_embd=32), **kwargs})).to(dtype)
    for p in gpt.parameters():
        p.data += 0.2 * torch.randn_like(p)
    bias = torch.zeros(ENC.n_vocab, dtype=dtype)
    bias[END], bias[QUERY] = 8.0, 6.0
    gpt.logits = lambda x: GPT.logits(gpt, x) * 0.5 + bias
    return gpt


def play(gpt, policy, turns, seed=0):
    """Trajectories of as many episodes as `turns` has entries."""
    worlds = [AnyWorld(n, [seed, i]) for i, n in enumerate(turns)]
    return rollout(gpt, worlds, policy, [np.random.default_rng([seed, i, 1]) for i in range(len(turns))])


def learned(gpt, trajs, **kwargs):
    """The learner's (logp, value) of all trained tokens, flat (M,)."""
    logp = torch.full((len(recorded(trajs, "logp")),), torch.nan, dtype=gpt.emb.weight.dtype)
    value = logp.clone()
    for p in pack(trajs, **kwargs):
        lp, v, _ = evaluate(gpt, p)
        logp[p.index], value[p.index] = lp.detach(), v.detach()
    return logp, value


def subset_policy(keep):
    """A context policy drawn by hypothesis: turn t keeps the segments of earlier turns that `keep` says."""
    def policy(turns):
        parts = [part for turn in turns for part in (turn.state, turn.action, turn.info)]
        return [token for i, part in enumerate(parts) if keep[(7 * len(turns) + i) % len(keep)] for token in part]
    return policy


policies = st.one_of(st.sampled_from(list(POLICIES.values())),
                     st.lists(st.booleans(), min_size=1, max_size=12).map(subset_policy))
turn_counts = st.lists(st.integers(1, 6), min_size=1, max_size=4)

# ----------------------------------------------------------------------------------------------
# The trajectory


@torch.no_grad()
def replay(gpt, traj, policy):
    """Oracle: logp and value of each written token, each context laid out anew and encoded whole, no cache."""
    logp, value = [], []
    for t, turn in enumerate(traj.turns):
        context = traj.task + (policy(traj.turns[:t]) if t else []) + [IS]
        for token in (turn.state + turn.action)[1:]:
            ids = torch.tensor([context])
            x = gpt(ids, torch.arange(len(context))[None], evaluation.Rows())[0, -1]
            logp.append(GPT_logp(gpt, x, token))
            value.append(gpt.value(x).item())
            context = context + [token]
    return logp, value


def GPT_logp(gpt, x, token):
    logits = gpt.logits(x)
    return (logits[token] - logits.exp().sum().log()).item()


@given(policies, turn_counts, st.integers(0, 99), st.sampled_from([64, 512, 8192]))
@example(mem1.mem1, [6, 4, 5], 0, 64)
@example(mem1.full, [6, 4, 5], 0, 64)
def test_sampler_learner_and_token_by_token_replay_agree(policy, turns, seed, budget):
    gpt = talkative()
    trajs = play(gpt, policy, turns, seed)
    logp, value = learned(gpt, trajs, budget=budget)
    slow_logp, slow_value = map(lambda xs: sum(xs, []), zip(*(replay(gpt, t, policy) for t in trajs)))
    for got, want in (logp, recorded(trajs, "logp")), (value, recorded(trajs, "value")), (logp, slow_logp), (value, slow_value):
        assert (got - torch.as_tensor(want, dtype=got.dtype)).abs().max() < 1e-10
    # Control: in the context of another policy the log-probabilities are others.
    if len(trajs[0].turns) > 3 and policy is mem1.mem1:
        other = torch.tensor(replay(gpt, trajs[0], mem1.full)[0], dtype=torch.float64)
        assert (other - logp[: len(other)]).abs().max() > 1e-3


def dense(gpt, traj):
    """Oracle: the whole trajectory as one row under mem1.mask(), by plain formulas. The logp of its trained tokens."""
    (ids, parent, trained), see = mem1.tree(traj), torch.tensor(mem1.mask(traj))
    ids, parent, hs, r = torch.tensor(ids), torch.tensor([*parent, -1]), gpt.hs, gpt.rope // 2
    before, depth = [torch.arange(len(ids))], [0]
    for _ in range(3):
        before.append(parent[before[-1]])  # the parent, its parent, and its parent; -1 where there is none
    for p in parent[1:-1].tolist():
        depth.append(depth[p] + 1)
    angle = torch.tensor(depth)[:, None] * 10000.0 ** (-torch.arange(r, dtype=torch.float64) / r)
    turns = torch.polar(torch.ones_like(angle), angle)

    def turned(x):
        return torch.cat([torch.view_as_real(torch.complex(x[:, :r], x[:, r : 2 * r]) * turns).transpose(1, 2).flatten(1), x[:, 2 * r :]], 1)

    x = gpt.ln_in(gpt.emb.weight[ids])
    for block in gpt.blocks:
        h = torch.cat([block.ln_1(x), torch.zeros_like(x[:1])])  # the last row: what stands before the first token
        h = sum(tap * h[before[3 - j]] for j, tap in enumerate(block.taps)) + h[:-1]
        q, k, v = (h @ block.qkv.weight.T).chunk(3, 1)
        heads = []
        for a in range(0, gpt.config.n_embd, hs):
            weight = (turned(q[:, a : a + hs]) @ turned(k[:, a : a + hs]).T / hs**0.5).exp() * see
            heads.append(weight / weight.sum(1, keepdim=True) @ v[:, a : a + hs])
        x = x + torch.cat(heads, 1) @ block.proj.weight.T
        x = x + (block.ln_2(x) @ block.up.weight.T).clamp(min=0) ** 2 @ block.down.weight.T
    logps = gpt.logits(gpt.ln_out(x)).log_softmax(1)
    chosen = torch.tensor(trained).nonzero()[:, 0]
    return logps[parent[chosen], ids[chosen]]


@FEWER
@given(policies, st.integers(1, 6), st.integers(0, 99), st.sampled_from(list(mem1.LAYOUTS)))
@example(mem1.mem1, 6, 0, "tree")
@example(mem1.mem1, 6, 0, "stitched")
@example(mem1.mem1, 6, 0, "released")
def test_trunk_and_branches_equal_the_dense_mask_in_outputs_and_gradients(policy, turns, seed, layout):
    gpt = talkative()
    beside, traj = map(mem1.LAYOUTS[layout], play(gpt, policy, [3, turns], seed))
    gradients = []
    for logp in dense(gpt, traj), evaluate(gpt, pack([beside, traj], 10**6)[0])[0]:
        if gradients:
            (p,) = pack([beside, traj], 10**6)
            logp = logp[p.index.argsort()][beside.n_trained :]
            assert (logp - slow).abs().max() < 1e-10
        slow = logp.detach()
        gpt.zero_grad()
        (logp * torch.arange(1, len(logp) + 1)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in gpt.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-10 * gradients[0].abs().max() and gradients[0].norm() > 1


@given(policies, st.integers(1, 6), st.integers(0, 99))
def test_the_mask_shows_each_trained_token_and_the_row_that_predicts_it_the_context_it_was_sampled_in(policy, turns, seed):
    (traj,) = play(talkative(), policy, [turns], seed)
    (ids, parent, trained), see = mem1.tree(traj), mem1.mask(traj)
    assert not np.triu(see, 1).any() and see.diagonal().all()
    contexts = []
    for t, turn in enumerate(traj.turns):
        context = traj.task + (policy(traj.turns[:t]) if t else []) + [IS]
        for token in (turn.state + turn.action)[1:]:
            contexts.append((context, token))
            context = context + [token]
    mine = [i for i, yes in enumerate(trained) if yes]
    assert [([ids[j] for j in np.flatnonzero(see[parent[i]])], ids[i]) for i in mine] == contexts
    assert all((see[i] == see[parent[i]]).sum() == len(ids) - 1 for i in mine)  # the parent sees the same but for the token


def test_stitched_differs_from_what_acted_by_positions_and_by_what_keys_carry_through_depth():
    """At turns 1 and 2 never; with one layer, no positions and no convolution nowhere; with two layers from turn 3 on."""
    for layers, off_from_turn_3 in (1, False), (2, True):
        gpt = talkative(n_layer=layers)
        gpt.rope = 0
        for block in gpt.blocks:
            block.taps.data.zero_()
        trajs = play(gpt, mem1.mem1, [6, 5, 6])
        off = (learned(gpt, [mem1.stitched(t) for t in trajs])[0] - learned(gpt, trajs)[0]).abs()
        turn = np.array([k for t in trajs for k, turn in enumerate(t.turns) for _ in (turn.state + turn.action)[1:]])
        assert off[turn < 2].max() < 1e-12 and (off[turn >= 2].max() > 1e-3) == off_from_turn_3
    gpt = talkative()  # as it is: turns 1 and 2 are exact still, in the released layout turn 2 is not
    for layout, exact in (mem1.stitched, True), (mem1.LAYOUTS["released"], False):
        off = (learned(gpt, list(map(layout, trajs)))[0] - learned(gpt, trajs)[0]).abs()
        assert off[turn == 0].max() < 1e-12 and (off[turn == 1].max() < 1e-12) == exact and off[turn == 2].max() > 1e-3


def test_exchanged_words_in_pruned_turns_reach_the_last_turn_in_the_stitched_layouts_and_not_in_the_tree():
    gpt = talkative()
    for policy_layout, reached in ("tree", False), ("stitched", True), ("released", True):
        layout = mem1.LAYOUTS[policy_layout]
        (traj,) = play(gpt, mem1.mem1, [6], seed=3)
        off = (learned(gpt, [layout(evaluation.exchange_pruned(traj))])[0] - learned(gpt, [layout(traj)])[0]).abs()
        n = len((traj.turns[-1].state + traj.turns[-1].action)[1:])
        assert (off[-n:] > 0).any() if reached else (off[-n:] == 0.0).all()
        assert (off[:-n] > 0).any()  # control: it does reach the turns that saw it


@FEWER
@given(policies, st.integers(2, 5), st.integers(0, 99), st.randoms())
def test_no_token_sees_what_comes_after_it_and_no_row_is_empty(policy, turns, seed, random):
    gpt = talkative()
    weights, attend = [], model_py.attend
    model_py.attend = lambda q, k, v, bias: (weights.append((q @ k.transpose(-2, -1) * q.size(-1) ** -0.5 + bias).softmax(-1)), attend(q, k, v, bias))[1]
    try:
        (traj,) = play(gpt, policy, [turns], seed)
        weights.clear()
        (p,) = pack([traj], 10**6)
        before = evaluate(gpt, p)[0]
    finally:
        model_py.attend = attend
    for i, w in enumerate(weights):  # (R, nh, S, L), layer by layer, in each rectangle by rectangle
        queries, keys, see = p.rectangles[i % len(p.rectangles)]
        itself = see & (keys[:, None] == queries[..., None])  # (R, S, L)
        assert torch.allclose(w.sum(-1), torch.ones(()).to(w)) and (w[itself[:, None].expand_as(w)] > 0).all()
        assert (itself.sum(-1) == see.any(-1)).all()
    branch = random.choice(range(len(traj.branches)))
    at = random.choice(range(len(traj.branches[branch].ids)))
    traj.branches[branch].ids[at:] = [(token + 1) % 256 for token in traj.branches[branch].ids[at:]]
    after = evaluate(gpt, pack([traj], 10**6)[0])[0]
    changed = (p.ids != pack([traj], 10**6)[0].ids)[0].nonzero()
    early = (p.at + 1 < changed.min()) | (p.at > changed.max())  # predicted from before the change, and itself not changed
    assert (before[early] == after[early]).all()
    if (~early).any():
        assert (before[~early] != after[~early]).any()  # control


def test_only_rows_that_predict_a_trained_token_get_a_gradient_and_padding_is_never_read():
    gpt = talkative()
    trajs = play(gpt, mem1.mem1, [6, 2, 4])
    (p,) = pack(trajs, 10**6)
    assert p.ids.numel() == sum(len(t.task) + sum(len(b.ids) for b in t.branches) for t in trajs)  # nothing twice, nothing padded
    rows = []

    def keep(module, args, output):
        output.retain_grad()
        rows.append(output)

    hook = gpt.ln_out.register_forward_hook(keep)
    before = evaluate(gpt, p)[0]
    hook.remove()
    before.sum().backward()
    grad = rows[0].grad[0].norm(dim=-1)
    assert len(rows) == 1 and (grad[p.at] > 0).all()
    grad[p.at] = 0.0
    assert (grad == 0.0).all()
    assert any((~see.any(2)).any() for _, _, see in p.rectangles) and any((~see.any(1)).any() for _, _, see in p.rectangles)
    for queries, keys, see in p.rectangles:  # other padding
        queries[~see.any(2)], keys[~see.any(1)] = 7, 7
    assert (evaluate(gpt, p)[0] == before).all()
    keys[see.any(1)] = 7  # control: what is no padding is read
    assert (evaluate(gpt, p)[0] != before).any()


@given(st.permutations(range(4)))
def test_the_order_of_the_episodes_changes_nothing(order):
    gpt = talkative()
    trajs = play(gpt, mem1.mem1, [4, 2, 5, 1])
    apart = [learned(gpt, [t])[0] for t in trajs]
    together = learned(gpt, [trajs[i] for i in order])[0]
    assert (together - torch.cat([apart[i] for i in order])).abs().max() < 1e-10


def test_packing_leaves_its_input_as_it_was():
    trajs = play(talkative(), mem1.mem1, [4, 2])
    describe = lambda: repr([(t.task, t.branches, t.turns) for t in trajs])
    before, packs = describe(), [pack(trajs, 100) for _ in range(2)]
    mem1.stitched(trajs[0])
    assert describe() == before
    for a, b in zip(*packs):
        assert all((getattr(a, k) == getattr(b, k)).all() for k in vars(a) if k != "rectangles")
        assert all((x == y).all() for group, other in zip(a.rectangles, b.rectangles) for x, y in zip(group, other))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_in_float32_sampler_and_learner_agree_to_1e_5(policy):
    gpt = talkative(torch.float32)
    trajs = play(gpt, policy, [6, 1, 4, 5, 6, 2])
    assert (learned(gpt, trajs)[0] - torch.tensor(recorded(trajs, "logp"))).abs().max() < 1e-5


@given(policies, turn_counts, st.integers(0, 99))
def test_what_the_agent_wrote_is_trained_exactly_once_and_what_it_was_given_never(policy, turns, seed):
    trajs = play(talkative(), policy, turns, seed)
    wrote = [token for t in trajs for turn in t.turns for token in (turn.state + turn.action)[1:]]  # the <IS> is given
    assert recorded(trajs, "ids") == wrote
    packs = pack(trajs, 64)
    index = torch.cat([p.index for p in packs])
    assert index.sort().values.tolist() == list(range(len(wrote)))
    assert torch.cat([p.target for p in packs])[index.argsort()].tolist() == wrote
    for p in packs:  # the row at `at` comes right before the token that it predicts
        assert (p.ids[0, p.at + 1] == p.target).all() and (p.before[2, p.at + 1] == p.at + 1).all()


def embedding_gradients(gpt, trajs, of):
    """d (sum of the logp of the trained tokens in `of`) / d (each input embedding), for one Pack."""
    (p,) = pack(trajs, 10**6)
    seen = []

    def keep(module, args, output):
        output.retain_grad()
        seen.append(output)

    hook = gpt.emb.register_forward_hook(keep)
    logp = evaluate(gpt, p)[0]
    hook.remove()
    logp[torch.isin(p.index, torch.tensor(of))].sum().backward()
    return seen[0].grad[0].norm(dim=-1)  # (N,)


def test_a_pruned_token_has_exactly_no_influence_and_a_kept_one_has_some():
    gpt = talkative(n_layer=3)
    trajs = play(gpt, mem1.mem1, [6], seed=3)
    first_of_turn = np.cumsum([0] + [len(t.state + t.action) - 1 for t in trajs[0].turns])
    grad = embedding_gradients(gpt, trajs, list(range(first_of_turn[4], first_of_turn[5])))  # of turn 5's tokens
    trunk, *branches = grad.split([len(trajs[0].task), *(len(b.ids) for b in trajs[0].branches)])
    turn = trajs[0].turns[3]
    kept = len(turn.state + turn.action + turn.info)
    assert (branches.pop(3)[:kept] > 0).all() and (trunk > 0).all()  # turn 4, where turn 5 reads it again
    assert (torch.cat(branches) == 0.0).all()  # turns 1 to 3, and turn 4 where it was written


def test_other_pruned_text_changes_nothing_bitwise_and_other_kept_text_does():
    gpt = talkative()
    (traj,) = play(gpt, mem1.mem1, [6], seed=3)
    before = learned(gpt, [traj])[0]
    per_branch = [sum(b.trained) for b in traj.branches]
    cut = sum(per_branch[:2])
    for branch in traj.branches[:2]:
        branch.ids[:] = [(token + 1) % 256 for token in branch.ids]
    after = learned(gpt, [traj])[0]
    assert (after[cut:] == before[cut:]).all() and (after[:cut] != before[:cut]).any()
    traj.branches[2].ids[1] = (traj.branches[2].ids[1] + 1) % 256  # a kept token, read again
    assert (learned(gpt, [traj])[0][cut : cut + per_branch[2]] != before[cut : cut + per_branch[2]]).all()


@FEWER
@given(policies, st.lists(st.integers(2, 5), min_size=2, max_size=4), st.integers(0, 99))
def test_an_episode_is_the_same_whatever_runs_beside_it(policy, turns, seed):
    gpt = talkative()
    together = play(gpt, policy, turns, seed)
    for i, traj in enumerate(together):
        (alone,) = rollout(gpt, [AnyWorld(turns[i], [seed, i])], policy, [np.random.default_rng([seed, i, 1])])
        assert alone.turns == traj.turns and np.allclose(recorded([alone], "logp"), recorded([traj], "logp"), atol=1e-10)
    assert [t.turns for t in play(gpt, policy, turns, seed + 1)] != [t.turns for t in together]  # control


def test_peak_of_mem1_is_bounded_by_what_it_keeps_and_that_of_full_context_grows():
    gpt = talkative()
    peaks = {name: [play(gpt, policy, [turns], 1)[0] for turns in (4, 8, 16)] for name, policy in POLICIES.items()}
    for traj in peaks["mem1"]:
        size = lambda t: sum(map(len, (t.state, t.action, t.info)))
        pairs = zip([Turn([], [], []), *traj.turns], traj.turns)
        assert traj.peak == max(size(a) + len(b.state + b.action) for a, b in pairs)
    for traj in peaks["full"]:
        assert traj.peak == len(mem1.full(traj.turns)) - len(traj.turns[-1].info)
    assert peaks["full"][2].peak > 2 * peaks["full"][0].peak and peaks["full"][2].kv_bytes > peaks["mem1"][2].kv_bytes


def test_a_mem1_tree_has_a_branch_a_turn_and_a_full_one_has_one():
    gpt = talkative()
    # Nothing is pruned before the third turn, so the first two share a branch.
    assert [len(play(gpt, mem1.mem1, [n])[0].branches) for n in (1, 2, 3, 6)] == [1, 1, 2, 5]
    assert [len(play(gpt, mem1.full, [n])[0].branches) for n in (1, 2, 3, 6)] == [1, 1, 1, 1]


def test_gradients_do_not_depend_on_the_packing():
    gpt = talkative()
    trajs = play(gpt, mem1.mem1, [6, 3, 4, 1])
    gradients = []
    for packs in pack(trajs, 10**6), pack(trajs, 40), pack(trajs, 200, which=[0, 3]) + pack(trajs, 200, which=[1, 2]):
        gpt.zero_grad()
        sum((evaluate(gpt, p)[0] * (1 + p.index % 3)).sum() for p in packs).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in gpt.parameters() if p.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-10) and torch.allclose(gradients[0], gradients[2], atol=1e-10)
    assert gradients[0].norm() > 1


def test_no_tensor_of_the_learner_or_the_model_is_made_on_another_device():
    with torch.device("meta"):
        gpt = GPT(GPTConfig(ENC.n_vocab))
    trajs = [demonstrate(envs.ComposedQA(2, seed=i), mem1.mem1, np.random.default_rng(0)) for i in range(3)]
    for p in pack(trajs):
        logp, value, entropy = evaluate(gpt, p.to("meta"))
        assert logp.device.type == "meta" and logp.shape == value.shape == entropy.shape == p.target.shape
        with pytest.raises((RuntimeError, NotImplementedError)):  # control: a CPU tensor among them does raise
            evaluate(gpt, p)


def test_no_tensor_of_the_sampler_is_made_on_another_device():
    with torch.device("meta"):
        gpt = GPT(GPTConfig(ENC.n_vocab))
    cache, one = Cache(gpt, 3), torch.zeros(3, 1, dtype=torch.long, device="meta")
    ones = torch.ones(3, dtype=torch.long, device="meta")
    gpt(one, cache.reserve(1, ones), cache)
    cache.keep_prompt()
    hidden = gpt(one, cache.reserve(1, ones), cache)
    cache.rollback(torch.ones(3, dtype=torch.bool, device="meta"))
    cache.keep([False, True, True])
    ids, logp = mem1.sample(gpt.logits(hidden[:, 0]), torch.rand(3, device="meta"))
    assert {x.device.type for x in (ids, logp, gpt.value(hidden), cache.n, cache.k, cache.v, cache.tail)} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):  # control
        mem1.sample(gpt.logits(hidden[:, 0]), torch.rand(3))


def test_with_products_in_bfloat16_sampler_and_learner_still_agree_roughly_and_the_probabilities_are_float32():
    gpt = talkative(dtype=torch.float32)
    gpt.half = True
    trajs = play(gpt, mem1.mem1, [4, 3])
    (p,) = pack(trajs)
    logp, value, _ = evaluate(gpt, p)
    acted = torch.tensor(recorded(trajs, "logp"))[p.index]
    assert logp.dtype == value.dtype == torch.float32 and 0 < (logp - acted).abs().max() < 0.1
    gpt.half = False
    assert 1e-4 < (evaluate(gpt, p)[0] - logp).abs().max() < 0.1  # control: the products were not float32


# ----------------------------------------------------------------------------------------------
# Tokens, parser, world

crafted = st.lists(st.sampled_from([*mem1.TAGS, "</info>", "<", ">", " ", "IS", "\n", "#1", " jelo", "\x00", "é", "\ud800", "<|endoftext|>"]))
texts = st.one_of(st.text(), crafted.map("".join), st.text(alphabet=st.characters(max_codepoint=0x10FFFF), max_size=30))


@given(texts)
@example("<IS><query><answer><info><end><task>")
def test_any_text_round_trips_and_none_yields_a_tag(text):
    ids = ENC.encode_ordinary(text)
    assert not set(ids) & set(TAG_IDS)
    assert ENC.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert ENC.encoding.encode(mem1.TAGS[1], allowed_special="all") == [IS]  # control: asked to, it would


def test_a_forged_tag_in_an_observation_stays_text():
    class Liar(AnyWorld):
        def step(self, kind, text):
            super().step(kind, text)
            return " <end> <IS> #1 jelo <answer> #1 jelo <end>"

    (traj,) = rollout(talkative(), [Liar(4, 0)], mem1.mem1, [np.random.default_rng(0)])
    assert all(turn.info[0] == INFO and not set(turn.info[1:]) & set(TAG_IDS) for turn in traj.turns[:-1])


def test_every_word_of_the_world_is_one_token_and_so_is_every_tag():
    assert all(len(ENC.encode_ordinary(f" {word}")) == 1 for word in envs.WORDS)
    assert len(set(envs.WORDS)) == len(envs.WORDS) and len(set(TAG_IDS)) == 6 and max(TAG_IDS) == ENC.n_vocab - 1


def test_tokens_go_from_the_sampler_to_the_learner_without_a_detour_through_text():
    """Ids that text would not give back: encode(decode(ids)) differs, as for broken UTF-8."""
    gpt = talkative()
    gpt.logits = lambda x: GPT.logits(gpt, x) + (torch.arange(ENC.n_vocab) < 256) * 4.0 + (torch.arange(ENC.n_vocab) == END) * 8.0
    (traj,) = play(gpt, mem1.full, [4])
    assert any(ENC.encoding.encode(ENC.decode(wrote), allowed_special="all") != wrote for turn in traj.turns for wrote in [turn.state + turn.action])
    assert [token for turn in traj.turns for token in turn.state + turn.action + turn.info][: len(traj.branches[0].ids)] == traj.branches[0].ids


@given(st.lists(st.integers(0, ENC.n_vocab - 1), max_size=40), st.lists(st.sampled_from(TAG_IDS), max_size=4))
def test_the_parser_takes_anything_and_loses_nothing(ids, tags):
    for mixed in ids, ids + tags, tags + ids, ids + [QUERY] + ids + [END], ids[:5] + [ANSWER] + [END]:
        kind, state, action, text = parse(mixed)
        assert state + action == mixed and kind in ("query", "answer", "malformed") and isinstance(text, str)
        pattern = "".join({QUERY: "q", ANSWER: "a", END: "e"}.get(token, "x" if token in TAG_IDS else ".") for token in mixed)
        want = {"q": "query", "a": "answer"}[re.search("[qa]", pattern)[0]] if re.fullmatch(r"\.*[qa]\.*e", pattern) else "malformed"
        assert kind == want


@given(st.sampled_from([envs.ComposedQA, envs.WebQA, envs.Dialogue, envs.Shop]), texts, texts, st.sampled_from(["query", "answer", "malformed", "", "reset"]), st.integers(1, 5))
def test_the_world_survives_any_action(world, first, second, kind, n):
    env = world(n, seed=[n])
    env.step("query", first)
    observation = env.step(kind, second)
    assert isinstance(observation, str) and len(observation) < 500
    assert env.done == (kind != "query") and 0 <= env.em <= n and 0 <= env.f1 <= n


def test_a_huge_action_is_cut_off_in_time():
    env = envs.ComposedQA(2, seed=0)
    start = time.perf_counter()
    env.step("query", " jelo heir" * 10**5)
    env.step("answer", " #1 jelo" * 10**5)
    assert time.perf_counter() - start < 5 and env.done


@pytest.mark.parametrize("n", [1, 2, 5, 16, 32, 64])
@pytest.mark.parametrize("hops", [(1, 2), (3, 3), (1, 3)])
def test_the_demonstrator_solves_every_size_unless_it_forgets_or_has_no_turns(n, hops):
    for policy in mem1.mem1, mem1.full, mem1.separate:
        for seed in range(3):
            env = demonstrate(envs.ComposedQA(n, hops, seed=seed), policy).env
            assert (env.em, env.f1, env.cause) == (n, n, "answered")
        assert demonstrate(envs.ComposedQA(16, seed=0), policy, amnesic=True).env.em < 8
        hurried = demonstrate(envs.ComposedQA(16, seed=0, max_turns=10), policy).env
        assert hurried.cause == "answered" and 3 < hurried.em < 10  # it answers in time, with what it has


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_dependency_is_what_each_written_token_looked_back_on(policy):
    traj = demonstrate(envs.ComposedQA(5, seed=1), policy)
    looked = 0.0
    for t, turn in enumerate(traj.turns):
        context = [*(policy(traj.turns[:t]) if t else []), IS]
        for token in turn.written:
            looked += len(context) + 0.5
            context.append(token)
    assert traj.dependency == looked > 0
    assert policy is mem1.full or looked < demonstrate(envs.ComposedQA(5, seed=1), mem1.full).dependency  # control


@pytest.mark.parametrize("n", [2, 5, 16])
def test_a_chained_question_needs_the_answer_of_an_earlier_one(n):
    chained = 0
    for seed in range(20):
        env = envs.ComposedQA(n, kinds=("chain",), seed=seed)
        starts = [question.split()[2] for question in env.questions]
        about = [start for start in starts if start.startswith("#")]
        assert len(set(about)) == len(about) and all(start in envs.INDICES[: envs.INDICES.index(env.golds[i][0])] for i, start in enumerate(starts) if start in about)
        solved = {policy: demonstrate(envs.ComposedQA(n, kinds=("chain",), seed=seed), policy).env.em for policy in (mem1.mem1, mem1.full, mem1.separate)}
        assert set(solved.values()) == {n}, solved
        chained += len(about)
        assert not about or demonstrate(envs.ComposedQA(n, kinds=("chain",), seed=seed), mem1.mem1, amnesic=True).env.em < n
    assert 0.15 < chained / (20 * n) < 0.6


@pytest.mark.parametrize("kind", ["count", "compare"])
def test_of_a_task_that_is_reduced_to_one_word_the_state_stays_constant(kind):
    play_ = lambda n, seed, policy=mem1.mem1, **kwargs: demonstrate(envs.ComposedQA(n, kinds=(kind,), seed=seed), policy, **kwargs)
    for n in 1, 2, 16, 64:
        assert all(play_(n, seed, policy).env.em == n for seed in range(5) for policy in (mem1.mem1, mem1.full, mem1.separate))
    size = lambda kind, n: max(len(ENC.decode(turn.state).split()) for seed in range(3)  # in words: in its own runs each is a token
                               for turn in demonstrate(envs.ComposedQA(n, hops=(2, 2), kinds=(kind,), seed=seed), mem1.mem1).turns)
    assert size(kind, 4) == size(kind, 64) and size("list", 64) > size("list", 4) + 60  # control
    assert sum(play_(8, seed, amnesic=True).env.em > 0 for seed in range(40)) < 20  # by luck only
    env = envs.ComposedQA(5, kinds=(kind,), seed=3)
    numbers = [gold for _, gold in env.golds]
    start, word = (env.prompt.split()[1:3]) if kind == "count" else (None, None)
    right = f"#{int(start[1:]) + numbers.count(word)}" if kind == "count" else env.golds[int(np.argmax([int(x[1:]) for x in numbers]))][0]
    env.step("answer", f" {right}")
    assert env.em == 5
    env = envs.ComposedQA(5, kinds=(kind,), seed=3)
    env.step("answer", f" {right} {right}")
    assert env.em == 0


@pytest.mark.parametrize("kind", ["count", "compare"])
def test_the_primer_counts_and_compares_as_a_slow_reader_does(kind):
    draw = lambda seed, **kwargs: envs.primer(np.random.default_rng(seed), 12, **kwargs)
    drawn = [(text.split(), answer) for text, answer in (draw(seed, kinds=["list", kind]) for seed in range(300)) if text.startswith(f" {kind}")]
    assert 20 < len(drawn) < 70 and not any(draw(seed)[0].startswith(f" {kind}") for seed in range(300))
    changed = collections.Counter()
    for head, answer in drawn:
        assert answer[0] == (f" {kind}", False) and answer[-1] == (" .", True)
        given, kept = [words.split() for words, learn in answer[1:] if not learn], [words.split() for words, learn in answer[1:-1] if learn]
        for k in range(1, len(given) + 1):
            before, values = given[:k - 1], [value for _, value in given[:k]]
            if kind == "count":
                counts, right = given[k - 1][1] == head[2], [f"#{int(head[1][1:]) + values.count(head[2])}"]
            else:
                counts = all(int(value[1:]) < int(values[-1][1:]) for _, value in before)
                right = given[max(range(k), key=lambda i: (int(values[i][1:]), -i))]
            assert kept[k - 1] == [kind] * counts + [";", *right]
            changed[counts] += 1
    assert min(changed.values()) > 40, changed


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_in_a_dialogue_what_was_last_said_of_a_question_counts(n):
    fates = collections.Counter()
    for seed in range(15):
        for policy in mem1.mem1, mem1.full, mem1.separate:
            traj = demonstrate(envs.Dialogue(n, seed=seed), policy)
            assert (traj.env.em, traj.env.cause) == (n, "answered"), seed
            assert [ENC.decode(turn.info) for turn in traj.turns] == [ENC.decode(turn.info) for turn in demonstrate(envs.Dialogue(n, seed=seed), policy).turns]
            assert max(len(turn.written) for turn in traj.turns) <= mem1.turn_cap(traj.env)  # nobody is cut off for what is right
        answer, said = ENC.decode(traj.turns[-1].action), "".join(traj.env.messages.values())
        at_first = {index: rest for index, *rest in envs.read_task(traj.env.prompt)[1]}
        for index, gold in traj.env.golds:
            fates["withdrawn" if not gold else "stays" if f"user {index} " not in said else "corrected" if index in at_first else "late"] += 1
            assert (f"{index} {gold}" in answer) if gold else (f"{index} " not in answer)
        deaf = envs.Dialogue(n, seed=seed)  # control: who does not listen fails, if anything was said
        deaf.messages = {}
        assert (demonstrate(deaf, mem1.mem1).env.em < n) == bool(said)
    assert n < 16 or min(fates[fate] for fate in ("withdrawn", "corrected", "late")) > 5, fates


@pytest.mark.parametrize("hops", [(1, 3), (2, 5)])
def test_no_demonstrator_is_cut_off_however_long_the_questions_are(hops):
    for n, seed in itertools.product((2, 8, 16), range(12)):
        for env in envs.Dialogue(n, hops, seed=seed), envs.ComposedQA(n, hops, seed=seed), envs.WebQA(n, hops, seed=[seed]):
            traj = demonstrate(env, mem1.mem1)
            assert traj.env.em == n and max(len(turn.written) for turn in traj.turns) <= mem1.turn_cap(env)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 40])
def test_in_the_shop_the_demonstrator_buys_the_best_that_can_be_afforded(n):
    perfect = 0
    for seed in range(15):
        for policy in mem1.mem1, mem1.full, mem1.separate:
            traj = demonstrate(envs.Shop(n, seed=seed), policy)
            env = traj.env
            afforded = [env.worth(index, env.color) for index, (*_, price) in env.products.items() if price <= env.limit and env.products[index][0] == env.type]
            best = max(env.worth(index, env.color) for index in env.products)
            assert env.cause == "answered" and env.em / n == best == env.best / n >= max(afforded, default=0.0) and len(traj.turns) <= env.max_turns
            assert max(len(envs.words(ENC.decode(turn.written))) + 3 for turn in traj.turns) <= mem1.turn_cap(env)  # in its own runs a word is a token
        perfect += env.em == n
        hurried = demonstrate(envs.Shop(n, seed=seed, max_turns=6), mem1.mem1).env
        assert hurried.cause == "answered" and hurried.em <= env.em
        assert demonstrate(envs.Shop(n, seed=seed), mem1.mem1).turns == demonstrate(envs.Shop(n, seed=seed), mem1.mem1).turns
    assert perfect >= 5


@given(st.lists(st.one_of(st.sampled_from(["<IS>", "<query>", "<end>", "<info>", ";", ":", "left=3", "left=1", "#64", "#9 chair #3", "next", "end", "chosen", "in red blue #4",
                                           "click #9", "#9 chair warm in red #4"]), st.text(max_size=4))), st.booleans())
def test_the_shopper_has_something_to_write_whatever_it_sees(parts, amnesic):
    state, kind, text = envs.Shop(3, seed=1).expert(" ".join(parts), amnesic)
    assert kind in ("query", "answer") and "<" not in state + text and text


def test_what_is_bought_is_paid_by_what_was_wanted_of_it():
    env = envs.Shop(8, seed=3)
    _, kind, *traits, _, color, _, limit, _ = env.prompt.split()
    for index, (its_kind, its_traits, its_colors, price) in env.products.items():
        for chosen in (*its_colors, None):
            shop = envs.Shop(8, seed=3)
            assert f"{index} {its_kind} {' '.join(its_traits)} in" in shop.step("query", f"click {index}")
            if chosen:
                assert f"chosen {chosen}" in shop.step("query", f"click {chosen}")
            shop.step("answer", "buy")
            wanted = [*(trait in its_traits for trait in traits), chosen == color, price <= int(limit[1:])]
            assert shop.em / 8 == (sum(wanted) / 4 if its_kind == kind else 0.0)
    for actions in (["buy"], ["click #99", "buy"], ["click red", "buy"]):  # nothing is open
        shop = envs.Shop(8, seed=3)
        [shop.step("query", action) for action in actions[:-1]], shop.step("answer", "buy")
        assert shop.em == 0


@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_web_is_one_for_all_episodes_and_gives_what_is_needed_to_whoever_asks_twice(n):
    assert len(envs.corpus().search.texts) > 2000 and envs.WebQA(n, seed=[1]).facts is envs.WebQA(n, seed=[2]).facts
    missed = opened = 0
    for seed in range(8):
        for policy in mem1.mem1, mem1.separate, mem1.full:
            traj = demonstrate(envs.WebQA(n, seed=[seed]), policy)
            assert traj.env.em == n and demonstrate(envs.WebQA(n, seed=[seed]), policy).turns == traj.turns  # the same seed, the same luck
        texts = [ENC.decode(turn.action + turn.info) for turn in traj.turns]
        missed, opened = missed + sum("nothing found" in text for text in texts), opened + sum("<query> page" in text for text in texts)
        env = envs.WebQA(n, seed=[seed])
        for fact in env.needed:
            subject, relation, _ = fact.split()
            found = [text for query in (f"{subject} {relation}", f"page {subject}") for _ in range(2) for text in env.search(query)]
            assert any(fact in text for text in found)
        assert [env.search(query) for query in ("page nobody", "page nobody", "page " * 10**5, "")][:2] == [[], []]
    assert n < 16 or missed > 10 and opened > 10


def test_a_file_of_facts_is_read_and_what_is_wrong_with_it_is_said(tmp_path):
    good = "São Tomé\tcapital\tSão Tomé\n# a comment\n\n东京\triver\tSumida\nहिन्दी\tscript\tदेवनागरी\n"
    for name, text, words in (("a.tsv", good + "just one\n", "line 6 is 'just one'"), ("b.tsv", good + "a\tb\t?!\n", "line 6"),
                              ("c.jsonl", '{"subject": "x", "relation": "y"}\n', "line 1"), ("d.jsonl", "{\n", "line 1"), ("e.tsv", "\n", "no fact")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=words):
            envs.read_facts(str(tmp_path / name))
    facts, told = envs.read_facts(str(tmp_path / "a.tsv"), True)
    assert "line 6" in told[0] and facts.known == {"São_Tomé": {"capital": "São_Tomé"}, "东京": {"river": "Sumida"}, "हिन्दी": {"script": "देवनागरी"}}
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(dict(subject="x", relation="y", object=o)) + "\n" for o in ("1", "2", "1")) + '{"subject": "X", "relation": "z", "object": 3}\n')
    facts, _ = envs.read_facts(str(tmp_path / "f.jsonl"))
    assert facts.known == {"x": {"z": "3"}} and len(facts.search.texts) == 3  # twice counts once; what is ambiguous is not asked for, but found
    assert set(facts.search("x y", 3)) >= {"x y 1", "x y 2"}


@pytest.mark.parametrize("line", [b"caf\xe9\ta\tb", b"\xff\xfea\x00", b'{"subject": "\\ud800", "relation": "r", "object": "o"}', b"[" * 200000,
                                  b'{"subject": null, "relation": "r", "object": "o"}', b'{"subject": "a", "relation": "r", "object": true}'])
def test_a_line_that_is_not_text_or_not_a_name_is_bad_and_can_be_skipped(tmp_path, line):
    for end in b"\n", b"\r\n":
        path = tmp_path / ("f.jsonl" if line[:1] in b"[{" else "f.tsv")
        good = b'{"subject": "a\xe2\x80\xa8b", "relation": "r", "object": "o"}' if path.suffix == ".jsonl" else b"a\x0bb\tr\to"  # ends no line
        path.write_bytes(b"\xef\xbb\xbf" + end.join([good, line, good.replace(b"\tr\t", b"\ts\t").replace(b'"r"', b'"s"')]))
        envs.read_facts.cache_clear()
        with pytest.raises(ValueError, match="f.(tsv|jsonl): line 2 is"):
            envs.read_facts(str(path))
        facts, told = envs.read_facts(str(path), True)
        assert facts.known == {"a_b": {"r": "o", "s": "o"}}
        assert len(told) == 2 and "line 2" in told[0]


def test_names_that_the_world_uses_itself_or_that_are_spelled_in_several_ways_do_no_harm(tmp_path):
    lines = ["France\truler\tuser", "user\truler\tPeru", "Peru\tuser\tFrance", "Chile\tanswer\tnow", "Chile\tleft\t1", "now\tleft\tanswer", "paris\triver\tnothing",
             "France\tcapital\tParis", "PARIS\tmayor\tfound", "River\truler\tChile", "Ana\tr\tJo", "Ana\tx1\tr", "Ana\tx2\tr", "Ana\tx3\tr"]
    (tmp_path / "f.tsv").write_text("\n".join(lines))
    facts, _ = envs.read_facts(str(tmp_path / "f.tsv"))
    assert facts.parse("france capital river") == ("France", ["capital", "river"]) and facts.follow("France", ["capital", "river"])[2][-1] == "paris river nothing"
    for n in 1, 2, 4, 8:
        for seed in range(10):
            for policy in mem1.mem1, mem1.full, mem1.separate:
                env = demonstrate(envs.ComposedQA(n, facts=facts, seed=seed), policy).env
                assert env.em == n, (env.prompt, env.golds)
            assert all(fact in env.search(" ".join(fact.split()[:2])) for path in env.paths.values() for fact in path)


def test_real_facts_make_the_same_tasks():
    facts, _ = envs.read_facts(str(HERE / "assets" / "countries.tsv"))
    for n in 1, 4, 16:
        for seed in range(5):
            env = envs.ComposedQA(n, facts=facts, seed=seed)
            assert all(fact in env.search(" ".join(fact.split()[:2])) for path in env.paths.values() for fact in path)
            for policy in mem1.mem1, mem1.full, mem1.separate:
                assert demonstrate(envs.ComposedQA(n, facts=facts, seed=seed), policy).env.em == n
    assert facts.parse(" new ZEALAND capital") == ("New_Zealand", ["capital"])
    for text in "nowhere capital", "France", "France madness":
        with pytest.raises(ValueError, match="`"):
            facts.parse(text)


def test_words_of_a_file_are_tokens_behind_all_others_and_change_none():
    vocabulary = mem1.Vocabulary(envs.WORDS)
    before = vocabulary.encode_ordinary(" #64 jelo : São_Tomé"), vocabulary.n_vocab, vocabulary.tags
    vocabulary.add(["São_Tomé", "jelo", "देवनागरी"])
    ids = vocabulary.encode_ordinary(" #64 jelo : São_Tomé देवनागरी")
    assert ids == [*before[0][:3], before[1], before[1] + 1] and vocabulary.tags == before[2] and len(before[0]) > 5
    assert vocabulary.decode(ids) == " #64 jelo : São_Tomé देवनागरी" and vocabulary.n_vocab == before[1] + 2


@pytest.mark.parametrize("amnesic", [False, True])
def test_what_is_asked_is_answered_a_line_a_question_and_marked_where_it_is_wrong(amnesic, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "rollout", lambda model, worlds, policy: [demonstrate(world, policy, amnesic=amnesic) for world in worlds])
    world = SimpleNamespace(facts=str(HERE / "assets" / "countries.tsv"), skip_bad_facts=False, top_k=3)
    evaluation.ask(None, mem1.mem1, world, "japan capital; peru capital river")
    first = "Japan capital: no answer (wrong: Tokyo)" if amnesic else "Japan capital: Tokyo"
    assert capsys.readouterr().out.splitlines()[-2:] == [first, "Peru capital river: Rímac"]


def test_an_agent_is_trained_on_a_file_and_can_be_asked(tmp_path):
    (tmp_path / "facts.tsv").write_text((HERE / "assets" / "countries.tsv").read_text())
    code, text, err = script("train.py", *TINY, "--agents", "mem1", "--facts", tmp_path / "facts.tsv", "--kinds", "list", "--out", tmp_path / "run")
    assert code == 0 and "345 facts" in text, err
    code, _, err = script("train.py", "--resume", "--facts", tmp_path / "facts.tsv", "--out", tmp_path / "run")
    assert code == 0, err  # the same facts, by the name of their file
    (tmp_path / "facts.tsv").unlink()  # the run has its own
    code, text, err = script("eval.py", tmp_path / "run", "--ask", "japan capital; peru capital river")
    assert code == 0 and ": Japan capital" in text and "Peru capital river: no answer (wrong: Rímac)" in text, (text, err)
    world = SimpleNamespace(facts=str(tmp_path / "run" / "facts.tsv"), skip_bad_facts=False)
    for questions in "", " ; ", ";".join(["japan capital"] * 81):
        with pytest.raises(ValueError, match="expected 1 to 80"):
            evaluation.ask(None, mem1.mem1, world, questions)


def test_the_demonstrator_knows_no_more_than_its_context_holds():
    for policy, most in (mem1.window, 4), (mem1.notes, 4), (mem1.amnesic, 2):
        solved = [demonstrate(envs.ComposedQA(16, seed=seed), policy).env.em for seed in range(10)]
        assert max(solved) <= most and (policy is mem1.amnesic or min(solved) >= 1), (policy, solved)
    found = " jelo pupil jero"
    for seen, now in ("", ""), ("<IS> #64 zupe ; #64 : jelo pupil .<query> jelo pupil<end><info> left=3 jelo pupil jero, jelo ally zupe", found):
        assert envs.demonstrator(" #64 : jelo pupil .", seen) == ((f"{found} .".strip(), "answer", "#64 jero") if now else ("; #64 : jelo pupil .", "query", "jelo pupil"))


@given(st.lists(st.one_of(st.sampled_from(["<IS>", "<query>", "<answer>", "<end>", "<info>", ";", ":", "::", ".", "left=3", "answer now", "#64", "#65", "#9",
                                           "jelo", "milu", "pupil", "neighbour", "jelo pupil jero", "user", "-", "user #65 -", "user #66 :: #64 pupil heir", "<query>(( *<end><info> x", "#64 : jelo pupil #65"]), st.text(max_size=4))),
       st.booleans(), st.sampled_from(["whole", "fresh", "apart"]), st.sampled_from(["", " count #17 jelo", " compare"]))
@example(["<query> (( pupil<end><info> left=3"], False, "apart", "")
@example(["; #64 jero #65 veba<query> foo bar<end><info> left=3"], False, "apart", "")
@example(["; #64 #65 : jelo pupil #65<query> jelo pupil<end><info> left=3 jelo pupil #9"], False, "whole", " compare")
@example(["; #17 #18 #64 : jelo pupil #65<query> jelo pupil<end><info> left=3 jelo pupil jero"], False, "whole", " count #17 jelo")
def test_the_demonstrator_has_something_to_write_whatever_it_sees(parts, amnesic, style, head):
    state, kind, text = envs.demonstrator(head + " #64 : jelo pupil #65 :: milu pupil neighbour .", " ".join(parts), amnesic, style)
    assert kind in ("query", "answer") and "<" not in state + text and (kind == "answer" or len(text.split()) >= 2)
    assert kind == "query" or re.fullmatch(r"#\d+|((^| )#\d+ #?\w+)*", text)


def test_the_search_tool_ranks_as_a_slow_bm25_does():
    env = envs.ComposedQA(8, hops=(2, 2), seed=5)
    pages = [[f.split()[0], *f.split()] for f in env.facts]
    for fact in env.facts:
        query = fact.split()[:2]
        def slow(page):
            result = 0.0
            for word in query:
                df = sum(word in other for other in pages)
                tf = sum(w == word for w in page)
                result += np.log(1 + (len(pages) - df + 0.5) / (df + 0.5)) * tf * 2.2 / (tf + 1.2)
            return result
        best = sorted(range(len(pages)), key=lambda i: (-slow(pages[i]), i))[:3]
        assert env.search(" ".join(query)) == [env.facts[i] for i in sorted(best)]
        assert fact in env.search(" ".join(query))  # nothing that is asked for by name is missed
    assert env.search("") == env.search("?!") == env.search("nobody knows") == []


@given(st.integers(1, 6), st.integers(0, 50))
def test_scores_equal_those_of_an_independent_scorer(n, seed):
    rng = np.random.default_rng(seed)
    golds = [(f"#{i}", str(rng.choice(envs.NAMES[:4]))) for i in range(n)]
    given_ = [(f"#{rng.integers(n + 1)}", " ".join(rng.choice(envs.NAMES[:4], rng.integers(0, 3)))) for _ in range(n)]
    em = f1 = 0
    for index, gold in golds:
        mine = [answer for i, answer in given_ if i == index][:1]
        em += mine == [gold]
        if mine and gold in mine[0].split():
            precision, recall = 1 / len(mine[0].split()), 1.0
            f1 += 2 * precision * recall / (precision + recall)
    assert envs.score(" ".join(f"{i} {a}" for i, a in given_), golds)[:2] == (em, pytest.approx(f1))


def test_the_same_seed_gives_the_same_episode_and_another_another():
    describe = lambda seed: (lambda env: (env.prompt, env.facts, env.golds))(envs.ComposedQA(4, seed=seed))
    assert describe([1, 2]) == describe([1, 2]) != describe([1, 3])


def test_training_validation_and_test_episodes_have_different_seeds():
    cfg = train.Config()
    prompts = {stage: {train.world(cfg, 0, stage, step, i, 2).prompt for step in range(3) for i in range(50)} for stage in (1, 2)}
    for split in evaluation.VALID, evaluation.TEST:
        prompts[split] = {envs.ComposedQA(2, seed=[0, split, 2, i, 0]).prompt for i in range(150)}
    for a in prompts:
        for b in prompts:
            assert (prompts[a] == prompts[b]) == (a == b) and (a == b or not prompts[a] & prompts[b])


# ----------------------------------------------------------------------------------------------
# PPO


def test_what_is_recorded_is_the_probability_with_which_the_token_was_drawn():
    torch.manual_seed(0)
    n, logits = 20000, torch.randn(1, 7, dtype=torch.float64) * 2
    ids, logp = mem1.sample(logits.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n)  # every uniform number once
    for token in range(7):
        share = (ids == token).double().mean().item()
        assert share == pytest.approx(logp[ids == token][0].exp().item(), abs=1.5 / n)
    assert (mem1.sample(logits)[0] == logits.argmax()).all() and mem1.sample(logits)[1] == logits.log_softmax(-1).max()


def one_iteration(monkeypatch, judge=None, **kwargs):
    """An iteration of PPO on random worlds, of one minibatch: (gradient of its only step, log row, what ppo's functions were given)."""
    given_, gradient = {}, []
    for name in "token_rewards", "policy_loss":
        monkeypatch.setattr(ppo, name, lambda *args, name=name, old=getattr(ppo, name), **kw: (given_.setdefault(name, []).append(args), old(*args, **kw))[1])
    cfg = train.Config(device="cpu", ppo_batch=5, ppo_epochs=1, ppo_minibatches=1, primer_coef=0.0, ppo_primer=1, primer_longest=2, grad_clip=1e9, **kwargs)
    gpt = talkative()
    worlds = [AnyWorld(n, [0, i]) for i, n in enumerate((4, 1, 5, 2, 3))]
    for i, world in enumerate(worlds):
        world.em = i / 10
    optimiser = SimpleNamespace(zero_grad=gpt.zero_grad, step=lambda: gradient.append(torch.cat([p.grad.flatten() for p in gpt.parameters()]).clone()))
    row = train.reinforce(cfg, train.Learner(gpt), optimiser, talkative(seed=1), mem1.mem1, worlds, 0, 0, 1, judge)
    return gradient[0], row, given_


def test_before_the_first_update_the_ratio_is_one_and_the_gradient_that_of_the_plain_policy_gradient(monkeypatch):
    gradient, row, given_ = one_iteration(monkeypatch, value_coef=0.0)
    assert row["gap"] < 1e-10 and abs(row["kl"]) < 1e-12 and row["clip"] == 0.0
    monkeypatch.setattr(ppo, "policy_loss", lambda logp, old_logp, adv, clip: -adv * logp)
    plain, _, _ = one_iteration(monkeypatch, value_coef=0.0)
    assert (gradient - plain).abs().max() < 1e-10 and gradient.norm() > 1e-3


@pytest.mark.parametrize("layout", mem1.LAYOUTS)
def test_the_split_into_passes_does_not_change_the_gradient(monkeypatch, layout):
    gradients = [one_iteration(monkeypatch, pack_tokens=n, layout=layout)[0] for n in (10**6, 60, 200)]
    assert max((g - gradients[0]).abs().max() for g in gradients[1:]) < 1e-10 and gradients[0].norm() > 1e-3


@pytest.mark.parametrize("pack_tokens", [10**6, 60])
def test_the_judge_climbs_the_likelihood_of_the_preferences(monkeypatch, pack_tokens):
    cfg = train.Config(device="cpu", judge_batch=12, reward="judge", grad_clip=1e9, pack_tokens=pack_tokens)
    gpt, actor, played, gradient = talkative(), talkative(seed=1), [], []
    monkeypatch.setattr(train, "rollout", lambda *args: played.extend(rollout(*args)) or played)
    optimiser = SimpleNamespace(zero_grad=gpt.zero_grad, step=lambda: gradient.append(torch.cat([p.grad.flatten() for p in gpt.parameters()]).clone()))
    monkeypatch.setattr(Trajectory, "reward", property(lambda self: float(len(self.turns[0].written) % 3)))
    row = train.prefer(cfg, train.Learner(gpt), optimiser, actor, mem1.mem1, 0, 0, 1)
    pairs = [*zip(played[::2], played[1::2])]
    assert len(pairs) == 6 and all(a.task == b.task for a, b in pairs) and sum(a.turns != b.turns for a, b in pairs) > 1
    loss = 0.0
    for i, pair in enumerate(zip(played[::2], played[1::2])):
        first, second = (evaluate(gpt, pack([train.judged(traj)])[0])[1][0] for traj in pair)
        better = train.rng(0, train.JUDGE, 0, i, 4).random() < 1 / (1 + np.exp(-4 * (pair[0].reward - pair[1].reward)))
        loss = loss - torch.log(torch.sigmoid(first - second if better else second - first)) / 6
    gpt.zero_grad()
    loss.backward()
    want = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in gpt.parameters()])
    assert (gradient[0] - want).abs().max() < 1e-6 * want.abs().max() and want.norm() > 0 and row["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_with_a_judge_it_is_the_judge_who_pays(monkeypatch):
    judge = talkative(seed=2)
    judge.value = lambda x: x[..., 0]
    _, _, given_ = one_iteration(monkeypatch, reward="judge", judge=judge)
    reward, *_ = given_["token_rewards"][0]
    trajs = rollout(talkative(), [AnyWorld(n, [0, i]) for i, n in enumerate((4, 1, 5, 2, 3))], mem1.mem1, [train.rng(0, train.PPO, 0, i, 2) for i in range(5)])
    want = torch.stack([evaluate(judge, pack([train.judged(traj)])[0])[1][0] for traj in trajs]).sigmoid()
    assert reward[[3, 4, 9, 11, 14]].tolist() == pytest.approx(want.tolist(), rel=1e-5) and reward.count_nonzero() == 5


def test_each_episode_is_paid_its_own_reward_at_its_own_last_token(monkeypatch):
    _, _, given_ = one_iteration(monkeypatch)
    reward, ends, old_logp, ref_logp, _ = given_["token_rewards"][0]
    assert len(reward) == ends.sum() == 15 and reward[[3, 4, 9, 11, 14]].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4]) and reward.sum() == pytest.approx(1.0)
    worlds = [AnyWorld(n, [0, i]) for i, n in enumerate((4, 1, 5, 2, 3))]
    alone = [rollout(talkative(), [w], mem1.mem1, [train.rng(0, train.PPO, 0, i, 2)])[0].n_trained for i, w in enumerate(worlds)]
    assert ends.nonzero()[[3, 4, 9, 11, 14], 0].tolist() == (np.cumsum(alone) - 1).tolist()


def test_a_turn_that_earns_is_paid_at_its_own_last_token(monkeypatch):
    _, _, given_ = one_iteration(monkeypatch, reward="step")
    reward, ends, *_ = given_["token_rewards"][0]
    assert reward.tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.25 + 0.1, *np.arange(0.25, 1.5, 0.25)[:4], 1.25 + 0.2, 0.25, 0.5 + 0.3, 0.25, 0.5, 0.75 + 0.4])
    (traj, *_) = rollout(talkative(), [AnyWorld(4, [0, 0])], mem1.mem1, [train.rng(0, train.PPO, 0, 0, 2)])
    assert ends.nonzero()[:4, 0].tolist() == (np.cumsum([len(turn.state + turn.action) - 1 for turn in traj.turns]) - 1).tolist()


def test_rewards_are_what_their_names_say():
    env = envs.ComposedQA(4, hops=(2, 2), seed=1)
    (a, x), (b, y), (c, z), (d, w) = env.golds
    for fact in sorted(env.needed)[:3]:
        env.step("query", " ".join(fact.split()[:2]))
    env.step("answer", f"{a} {x} {b} {y} indeed {c} nobody")
    assert {name: reward(env) for name, reward in envs.REWARDS.items()} == pytest.approx(
        {"em": 1 / 4, "f1": (1 + 2 / 3) / 4, "partial": 2 / 4, "all": 0.0, "format": 1 / 4 + 0.2, "step": 1 / 4})
    assert len(env.gains) == 4 and env.gains[3] == 0.0 and sum(env.gains) >= 0.5 * 3 / 8
    traj = demonstrate(envs.ComposedQA(4, hops=(2, 2), seed=1), mem1.mem1)
    assert sum(traj.rewards("step")) == pytest.approx(1.5) and sum(traj.rewards("all")) == sum(traj.rewards()) == 1.0
    again = envs.ComposedQA(4, hops=(2, 2), seed=1)
    [again.step("query", " ".join(sorted(env.needed)[0].split()[:2])) for _ in range(3)]
    assert again.gains[0] > 0.0 == again.gains[1] == again.gains[2]  # found once, paid once


def test_a_part_of_an_answer_is_words_of_it_not_letters():
    golds = [("#1", "new_york"), ("#2", "jero"), ("#3", "rio grande")]
    assert envs.score("#1 york #2 er #3 grande", golds)[::2] == (0, 1)
    assert envs.score("#1 e #2 o jero #3 the rio grande river", golds)[::2] == (0, 2)


@pytest.mark.parametrize("world, right, wrong, cause", [
    (lambda: envs.ComposedQA(8, kinds=("count",), seed=1), r"; #(\d+)", "; #99", "remembers something else"),
    (lambda: envs.ComposedQA(8, kinds=("compare",), seed=1), r"; #\d+ #\d+", "; #9 #9", "remembers something else|made up an entry|changed an entry"),
    (lambda: envs.ComposedQA(8, kinds=("count",), seed=1), r"<answer> #\d+", "<answer> #99", "wrong answer"),
    (lambda: envs.Dialogue(8, seed=1), r" user #\d+ -", "", "remembers something else"),
    (lambda: envs.Shop(8, seed=1), r"; #\d+[ \w]* :(?=.*<query>)", ";:", "lost an entry")])
def test_of_whatever_an_agent_has_to_remember_a_slip_has_a_cause(world, right, wrong, cause):
    turns, slips = demonstrate(world(), mem1.mem1).turns, []
    for turn in turns:
        text = ENC.decode(turn.written)
        changed = re.sub(right, wrong, text)
        if changed != text:
            *_, tag, rest = re.split("(<query>|<answer>)", changed.removesuffix("<end>"))
            state = changed[: len(changed) - len("<end>" + tag + rest)]
            ids = [*ENC.encode_ordinary(state), *ENC.encode_ordinary(""), ENC.tags[tag], *ENC.encode_ordinary(rest), END]
            slips.append(evaluation.difference(ids, turn.written))
        assert evaluation.difference(turn.written, turn.written) is None  # control
    assert slips and all(re.fullmatch(cause, slip or "") for slip in slips), slips


@pytest.mark.parametrize("env", [envs.ComposedQA, envs.WebQA])
def test_what_was_found_by_a_search_or_on_a_page_is_looked_for_in_the_state(env, monkeypatch):
    monkeypatch.setattr(evaluation, "load", lambda *a: None)
    held = {}
    for amnesic in False, True:
        monkeypatch.setattr(evaluation, "play", lambda *a: iter([demonstrate(env(6, seed=[i]), mem1.mem1, amnesic) for i in range(8)]))
        rows = evaluation.memory({"mem1": None}, None, {"mem1": ("mem1", mem1.mem1)}, 6, 8, lambda line: None)["mem1"]
        held[amnesic] = [row["held"] for row in rows.values() if row["found"]]
        assert max(row["found"] for row in rows.values()) >= 5  # of six the last is found when nothing is left to ask
    assert set(held[False]) == {1.0} and min(held[True]) < 0.5  # control: who forgets holds less


def test_with_another_layout_ppo_starts_from_ratio_one_and_the_gap_says_what_the_layout_changed(monkeypatch):
    _, row, given_ = one_iteration(monkeypatch, layout="stitched")
    logp, old_logp = given_["policy_loss"][0][:2]
    assert (logp - old_logp).abs().max() < 1e-10 and row["gap"] > 1e-3


@pytest.mark.parametrize("cap", [1, 2])
def test_turns_cut_off_at_once_and_episodes_of_one_token_give_a_finite_step(monkeypatch, cap):
    monkeypatch.setattr(mem1, "turn_cap", lambda env: cap)
    gradient, row, given_ = one_iteration(monkeypatch)
    assert torch.isfinite(gradient).all() and gradient.norm() > 0 and all(np.isfinite(value) for value in row.values())
    assert row["tokens"] <= 15 * cap and len(given_["token_rewards"][0][1]) == row["tokens"]


def test_a_process_without_work_takes_part_in_the_backward_pass_with_a_gradient_of_zero():
    gpt = talkative()
    (p,) = pack(play(gpt, mem1.mem1, [3, 2]), which=[])
    logp, value, entropy = evaluate(gpt, p)
    assert len(logp) == len(p.target) == 0
    (logp.sum() + value.sum() + entropy.sum()).backward()
    assert all((q.grad == 0.0).all() for q in gpt.parameters())


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_gae_is_the_double_sum_of_its_definition(lengths, gamma, lam, seed):
    rng, rewards, values, want = np.random.default_rng(seed), [], [], []
    for T in lengths:
        r, v = rng.normal(size=T), np.append(rng.normal(size=T), 0.0)
        want += [sum((gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k]) for k in range(T - t)) for t in range(T)]
        rewards, values = [*rewards, *r], [*values, *v[:T]]
    last = torch.zeros(sum(lengths), dtype=torch.bool)
    last[np.cumsum(lengths) - 1] = True
    adv, ret = ppo.gae(torch.tensor(rewards), torch.tensor(values), last, gamma, lam)
    assert np.allclose(adv, want) and np.allclose(ret - adv, values)
    assert not torch.isnan(ppo.whiten(adv)).any()


def test_the_price_of_leaving_the_reference_and_the_reward_land_on_their_tokens():
    last = torch.tensor([False, True, True])
    r = ppo.token_rewards(torch.tensor([1.0, 0.5]), last, torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([-2.0, -1.0, -1.0]), 0.1)
    assert torch.allclose(r, torch.tensor([-0.1, 1.0, 0.6]))


@pytest.mark.parametrize("ratio, adv, alive", [(1.0, 1, True), (1.1, 1, True), (1.3, 1, False), (0.7, 1, True),
                                               (1.0, -1, True), (0.7, -1, False), (1.3, -1, True), (0.9, -1, True)])
def test_the_clip_stops_the_gradient_where_the_ratio_has_gone_far_enough_and_only_there(ratio, adv, alive):
    logp = torch.tensor(np.log(ratio), requires_grad=True)
    ppo.policy_loss(logp, torch.tensor(0.0), torch.tensor(float(adv)), clip=0.2).backward()
    assert logp.grad.item() == (pytest.approx(-ratio * adv) if alive else 0.0)


def test_whitening_is_over_all_tokens_and_survives_constants():
    x = torch.randn(1000, dtype=torch.float64) * 3 + 5
    w = ppo.whiten(x)
    assert abs(w.mean()) < 1e-9 and abs(w.var(unbiased=False) - 1) < 1e-6
    assert (ppo.whiten(torch.full((5,), 3.0)) == 0).all() and (ppo.whiten(torch.tensor([2.0])) == 0).all()


def test_k3_estimates_the_exact_kl():
    torch.manual_seed(0)
    p, q = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * ppo.approx_kl(q, p)).sum() == pytest.approx(exact.item()) and (ppo.approx_kl(q, p) >= 0).all()


# ----------------------------------------------------------------------------------------------
# Learning


class Cue:
    """Told a cue after the first turn, asked for it in the third: it has to pass through the second state."""
    n_objectives, f1, cause, width, words = 1, 0.0, None, 1, (" ally", " rival")

    def __init__(self, seed):
        self.prompt, self.turn, self.done, self.em = " now", 0, False, 0
        self.cue = self.words[np.random.default_rng(seed).integers(2)]

    def step(self, kind, text):
        self.turn += 1
        self.done = self.turn == 3
        self.em = int(self.done and text.startswith(self.cue))
        return self.cue if self.turn == 1 else ""


def hint_at_cue(env, policy, draw):
    """A demonstrator who writes the cue in half of its states and answers, and any word in the others."""
    traj, words = Trajectory(env, [TASK, *ENC.encode_ordinary(env.prompt)]), [env.cue, *env.words]
    token = lambda: ENC.encoding.encode_single_token(words[draw.choice(3, p=[0.5, 0.25, 0.25])])
    while not env.done:
        traj.open_turn(policy)
        traj.close_turn([token(), QUERY, token(), END])
    return traj


def test_ppo_learns_to_carry_a_cue_in_the_internal_state_and_can_not_with_the_state_blanked(monkeypatch):
    monkeypatch.setattr(mem1, "turn_cap", lambda env: 5)
    allowed = torch.full((ENC.n_vocab,), -1e9)
    allowed[[*(ENC.encoding.encode_single_token(word) for word in Cue.words), QUERY, END]] = 0.0
    through_the_state, blanked = lambda turns: turns[-1].state + turns[-1].info, lambda turns: turns[-1].info
    earned = []
    for policy in through_the_state, blanked:
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(ENC.n_vocab, n_layer=2, n_head=2, n_embd=32))
        gpt.logits = lambda x: GPT.logits(gpt, x) + allowed
        cfg = train.Config(device="cpu", ppo_batch=64, kl_coef=0.0, primer_coef=0.0, ppo_primer=1, primer_longest=2)
        learner, optimiser = train.Learner(gpt), torch.optim.AdamW(gpt.parameters(), lr=3e-3)
        for step in range(60):
            packs = pack([hint_at_cue(Cue([9, step, i]), policy, np.random.default_rng([step, i])) for i in range(32)])
            train.optimise(learner, optimiser, cfg, [(p, lambda p, logp, value, entropy: -logp.mean()) for p in packs])
        rows = [train.reinforce(cfg, learner, optimiser, gpt, policy, [Cue([step, i]) for i in range(64)], step, 0, 1)
                for step in range(30)]
        earned.append(np.mean([row["reward"] for row in rows[-5:]]))
        assert max(row["gap"] for row in rows) < 1e-4
    assert earned[0] > 0.9 and earned[1] < 0.65, earned


def test_before_the_first_update_the_ratio_is_one_and_the_gradient_is_the_policy_gradient():
    gpt = talkative()
    trajs = play(gpt, mem1.mem1, [4, 5])
    (p,) = pack(trajs)
    old, adv = torch.tensor(recorded(trajs, "logp"), dtype=torch.float64)[p.index], torch.randn(len(p.index), dtype=torch.float64)
    gradients = []
    for loss in (lambda logp: ppo.policy_loss(logp, old, adv).sum()), (lambda logp: -(adv * logp).sum()):
        gpt.zero_grad()
        logp = evaluate(gpt, p)[0]
        loss(logp).backward()
        gradients.append(torch.cat([x.grad.flatten() for x in gpt.parameters() if x.grad is not None]))
    assert ppo.clipped(logp, old).sum() == 0 and ppo.approx_kl(logp, old).max() < 1e-15
    assert torch.allclose(*gradients, atol=1e-9) and gradients[0].norm() > 1e-3


# ----------------------------------------------------------------------------------------------
# The scripts

HERE = Path(__file__).parent
TINY = ("--preset debug --primer-steps 4 --primer-batch 8 --demos-steps 4 --ppo-steps 4 --ppo-batch 6 --ppo-minibatches 3 --eval-every 2 "
        "--valid-episodes 2 --eval-episodes 4 --eval-objectives 1 2").split()


def script(name, *flags, interrupt=None, patch=""):
    """Run a script to its end; interrupt=(file, lines, signal): send the signal when the file has so many lines.

    patch: a statement to be run before it, on the imported module.
    """
    command = ["-c", f"import {name[:-3]} as module; {patch}; module.main()"] if patch else [name]
    process = subprocess.Popen([sys.executable, *command, *map(str, flags)], cwd=HERE, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while interrupt and process.poll() is None:
        file, lines, number = interrupt
        if file.exists() and file.read_text().count("\n") >= lines:
            process.send_signal(number)
            break
        time.sleep(0.01)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def metrics(run, without=("minutes", "tok_s")):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


VARIES = "time", "kv_bytes"  # with the machine and with what is played side by side


def results(run):
    table = json.loads((run / "results.json").read_text())
    meta = table.pop("meta")
    return {p: {n: {k: v for k, v in cell.items() if k not in VARIES} for n, cell in rows.items()} for p, rows in table.items()}, meta


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    code, text, err = script("train.py", *TINY, "--out", out)
    assert code == 0, err
    return out, text


def test_a_run_leaves_its_config_metrics_checkpoint_and_results(finished):
    out, text = finished
    table, meta = results(out)
    assert list(table) == ["mem1", "mem1-demos", "full", "full-demos", "truncate"] and all(list(rows) == ["1", "2"] for rows in table.values())
    assert all({"em", "f1", "peak", "dependency", "right", "state", "query", "info", "answer", "tokens"} <= set(cell) for rows in table.values() for cell in rows.values())
    assert {"seed", "episodes", "commit", "machine", "minutes"} <= set(meta)
    assert json.loads((out / "config.json").read_text())["config"]["ppo_batch"] == 6
    steps = [(row["stage"], row["agent"], row["step"]) for row in metrics(out)]
    assert steps == [(stage, agent, i + 1) for stage, agent in
                     [("primer", None), ("demos", "mem1"), ("ppo", "mem1"), ("demos", "full"), ("ppo", "full")] for i in range(4)]
    assert max(row["gap"] for row in metrics(out) if row["stage"] == "ppo") < 1e-4
    assert "reward" in text and "gap" in text and str(out) in text


def test_a_sweep_trains_all_agents_from_all_seeds_and_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "POLICIES", {"mem1": mem1.mem1, "full": mem1.full})
    monkeypatch.setattr(evaluation, "FARTHEST", 4)
    flags = ["--sweep", "1", "--out", str(tmp_path / "s"), "--assets", str(tmp_path / "assets"), "--nproc", "2", "--no-compile", *TINY]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    (tmp_path / "README.md").write_text("before\n<!-- table: em -->\n<!-- end -->\nafter\n")
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kwargs: real([*command, *["--no-such-flag"] * any("wide-0" in word for word in command)], **kwargs))
    with pytest.raises(SystemExit, match="not finished: wide-0"):
        train.main()
    before = (tmp_path / "s" / "seed-0" / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(subprocess, "Popen", real)
    train.main()
    assert (tmp_path / "s" / "seed-0" / "results.json").stat().st_mtime_ns == before  # not trained again
    one = json.loads((tmp_path / "assets" / "results.json").read_text())
    assert set(one["seeds"]["0"]) >= {"mem1", "mem1-demos", "full", "full-2x", "truncate"} and "of an earlier sweep" in capsys.readouterr().out
    text = (tmp_path / "README.md").read_text()
    assert text == f"before\n<!-- table: em -->\n\n{evaluation.report(one)['em']}\n\n<!-- end -->\nafter\n"
    assert list(one["seeds"]["0"]["mem1"]) == ["1", "2", "4"] and one["meta"]["wide-0"]["config"]["n_embd"] > one["meta"]["seed-0"]["config"]["n_embd"]


def test_evaluation_reads_a_run_and_repeats_its_results(finished):
    out, _ = finished
    code, text, err = script("eval.py", out, "--json")
    assert code == 0, err
    again = {p: {n: {k: v for k, v in cell.items() if k not in VARIES} for n, cell in rows.items()} for p, rows in json.loads(text).items()}
    assert again == results(out)[0]
    code, text, _ = script("eval.py", out, "--show", 2, "--policies", "full")
    assert code == 0 and text.count("task   <task>") == 2 and "right would be" in text
    code, text, _ = script("eval.py", out, "--show", 2, "--kinds", "compare", "--policies", "mem1")  # tasks that it was not trained for
    assert code == 0 and text.count("task   <task> compare #") == 2


def test_the_benchmark_measures_the_same_work_and_says_what_it_promises():
    code, text, err = script("eval.py", "--bench", "--json", "--episodes", 1)
    assert code == 0, err
    found = json.loads(text)
    assert {"rollout_vs_hf", "rollout_vs_nocache", "learner_vs_per_turn_2", "learner_vs_per_turn_16", "mfu", "update_vs_trl", "env_share",
            "cache_growth_mem1", "cache_growth_full"} <= set(found)
    assert found["rollout_vs_hf"] is found["update_vs_trl"] is None and found["rollout_vs_nocache"] > 1
    assert 0 < found["mfu"] < 1 and 0 < found["env_share"] < 0.5


def test_layouts_are_measured_against_what_acted(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "eval.py --layouts --json --episodes 3 --objectives 2,4".split())
    evaluation.main()
    measures = json.loads(capsys.readouterr().out)
    assert list(measures) == ["tree", "stitched", "released"] and all(list(m) == ["2", "4"] for m in measures.values())
    for n in "2", "4":
        tree, stitched, released = (measures[layout][n] for layout in measures)
        assert tree["mean_nats"] == tree["leak"] == 0.0 < stitched["leak"]
        assert 1e-3 < stitched["mean_nats"] < released["mean_nats"] and stitched["tokens"] == released["tokens"] < tree["tokens"]


def test_ppo_starts_again_from_the_imitated_agent_of_a_run_in_another_layout(finished, tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--start", finished[0], "--agents", "mem1", "--layout", "stitched", "--out", tmp_path / "again"]
    code, _, err = script("train.py", *flags)
    assert code == 0, err
    assert [row["stage"] for row in metrics(tmp_path / "again")] == ["ppo"] * 4
    code, _, err = script("train.py", *TINY, "--start", finished[0], "--agents", "mem1", "--env", "shop", "--out", tmp_path / "shop")
    assert code == 2 and "other words" in err and len(err.splitlines()) == 1
    assert results(tmp_path / "again")[0]["mem1-demos"] == results(finished[0])[0]["mem1-demos"]
    monkeypatch.setattr(sys, "argv", ["eval.py", "--json", "--compare", str(finished[0]), str(tmp_path / "again")])
    evaluation.main()
    groups = json.loads(capsys.readouterr().out)
    assert list(groups) == ["tree", "stitched"] and all(len(values) == 1 for values in groups["stitched"].values())
    assert groups["tree"]["to 0.8"] == [None]  # nothing is earned in so short a run
    with open(tmp_path / "again" / "metrics.jsonl", "r+") as file:
        rows = [{**json.loads(line), "reward": float(i >= 1)} for i, line in enumerate(file)]
        file.seek(0)
        file.writelines(json.dumps(row) + "\n" for row in rows * 4)  # 0 1 1 1, four times: 0.8 of the five that begin at the second
    evaluation.main()
    assert json.loads(capsys.readouterr().out)["stitched"]["to 0.8"] == [6.0]


def test_the_runs_of_a_sweep_take_a_gpu_each_of_those_that_the_user_may_see(tmp_path, monkeypatch):
    begun = []

    class Process:
        def __init__(self, command, env, **kwargs):
            begun.append(env["CUDA_VISIBLE_DEVICES"])
            self.returncode, self.left = 1, 3 + len(begun)

        def poll(self):
            self.left -= 1
            return None if self.left else 1

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    cfg = train.Config(device="cuda", nproc=2, sweep=2, out=str(tmp_path), assets=str(tmp_path))
    with pytest.raises(SystemExit, match="not finished: seed-0, seed-1, wide-0, wide-1"):
        train.sweep(cfg, {})
    assert begun == ["4", "5", "4", "5"]


@pytest.mark.parametrize("reward", ["em", "step"])
def test_the_critic_of_a_demonstrator_learns_what_is_still_to_be_earned(reward):
    traj, cfg = demonstrate(envs.ComposedQA(4, seed=1), mem1.mem1), train.Config(reward=reward)
    ends = torch.cat([torch.arange(len(turn.written)) == len(turn.written) - 1 for turn in traj.turns])  # (M,)
    zeros, last = torch.zeros(len(ends)), torch.arange(len(ends)) == len(ends) - 1
    rewards = ppo.token_rewards(torch.tensor(traj.rewards(reward)), ends, zeros, zeros, 0.0)
    assert train.returns(traj, cfg) == pytest.approx(ppo.gae(rewards, zeros, last)[1].numpy(), abs=1e-6)
    assert (len({*train.returns(traj, cfg)}) > 2) == (reward == "step")  # control


def test_what_stops_a_run_for_a_while_does_not_count_in_its_minutes():
    rows = [dict(stage=stage, agent="mem1", minutes=m) for stage, m in (("demos", 1), ("demos", 2), ("demos", 103), ("ppo", 107), ("ppo", 111))]
    assert evaluation.undisturbed(rows) == 3 * 1 + 2 * 4
    assert evaluation.undisturbed(rows[:2]) == 2  # control: what was not stopped counts whole


@pytest.mark.parametrize("lines, number", [(2, signal.SIGINT), (14, signal.SIGTERM)])
def test_an_interrupted_run_resumed_equals_the_uninterrupted_one(finished, tmp_path, lines, number):
    code, text, err = script("train.py", *TINY, "--out", tmp_path / "run", interrupt=(tmp_path / "run" / "metrics.jsonl", lines, number))
    assert code == 128 + number and "--resume" in text and not err, (code, text, err)
    assert len(metrics(tmp_path / "run")) < 20
    code, _, err = script("train.py", "--out", tmp_path / "run", "--resume")
    assert code == 0, err
    assert metrics(tmp_path / "run") == metrics(finished[0]) and results(tmp_path / "run")[0] == results(finished[0])[0]


def a_few_updates(rank, world_size, port, out, pack_tokens=60):
    """What a process does in seven PPO iterations, on rewards worth learning from; in the sixth of them the last process has
    a loss that is not a number. Leaves [(log row, gradient, parameters), ...] in a file."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=60))
    cfg = train.Config(device="cpu", ppo_batch=5, ppo_epochs=2, ppo_minibatches=3, ppo_primer=4, primer_longest=3, pack_tokens=pack_tokens)
    gpt, done, honest = talkative(), [], train.evaluate
    learner = train.Learner(gpt) if world_size == 1 else torch.nn.parallel.DistributedDataParallel(train.Learner(gpt))
    optimiser = torch.optim.AdamW(gpt.parameters(), lr=1e-3)
    earned, Trajectory.rewards = Trajectory.rewards, lambda self, kind="em": [len(turn.written) % 5 / 5 for turn in self.turns]
    for step in range(7):
        if (rank, step) == (world_size - 1, 5):
            train.evaluate = lambda *a: [x * float("nan") for x in honest(*a)]
        worlds = [AnyWorld(turns, [step, i]) for i, turns in enumerate((4, 2, 1, 5, 3))]
        row = train.reinforce(cfg, learner, optimiser, talkative(seed=1), mem1.mem1, worlds[rank::world_size], step, rank, world_size)
        flat = lambda tensors: torch.cat([x.detach().flatten() for x in tensors]).clone()
        done.append((row, flat(p.grad for p in gpt.parameters()), flat(gpt.parameters())))
        train.evaluate = honest
    torch.save(done, out / f"{world_size}-{rank}-{pack_tokens}.pt")
    Trajectory.rewards = earned


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_the_split_into_processes_and_passes_changes_nothing_and_all_skip_a_step_that_is_not_finite(tmp_path):
    """Three processes share five episodes in three minibatches: some have none, the last one has a single turn."""
    for pack_tokens in 60, 10**6:
        a_few_updates(0, 1, None, tmp_path, pack_tokens)
    for world_size in 2, 3:
        torch.multiprocessing.spawn(a_few_updates, (world_size, free_port(), tmp_path), nprocs=world_size)
    load = lambda name: torch.load(tmp_path / f"{name}.pt")
    alone = load("1-0-60")
    before = 0.0
    for name in "1-0-1000000", "2-0-60", "2-1-60", "3-0-60", "3-1-60", "3-2-60":
        for step, ((row, gradient, weights), (same_row, same_gradient, same_weights)) in enumerate(zip(alone, load(name))):
            assert (weights - same_weights).abs().max() < 1e-9, (name, step)
            assert row["skipped"] == same_row["skipped"] == 6 * (step == 5)
            if step != 5:
                assert (gradient - same_gradient).abs().max() < 1e-9 * gradient.norm()
                assert {k: v for k, v in row.items() if k != "gap"} == {k: pytest.approx(v, abs=1e-9) for k, v in same_row.items() if k != "gap"}
    for step, (_, _, weights) in enumerate(alone):
        assert (weights - before).abs().max() == 0.0 if step == 5 else (weights - before).abs().max() > 1e-4  # control: the others do move
        before = weights


def two_steps(rank, world_size, port, out):
    """Two steps of imitation by several processes, at once and with an interruption between them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=60))
    cfg = train.Config(device="cpu", nproc=world_size, primer_steps=2, primer_batch=12, eval_every=1, eval_objectives=(1,), eval_episodes=3, ppo_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "table", lambda *a: {})
        patch.setattr(train, "POLICIES", {})
        for name, stops in ("whole", [0]), ("parts", [signal.SIGTERM]), ("parts", [0]):
            cfg.out, cfg.agents, cfg.resume = str(out / name), (), (out / name / "checkpoint.pt").exists()
            Path(cfg.out).mkdir(exist_ok=True)
            dist.barrier()
            with contextlib.suppress(SystemExit):
                train.train(rank, world_size, cfg, stops)


def test_a_run_of_three_processes_that_was_interrupted_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    torch.multiprocessing.spawn(two_steps, (3, free_port(), tmp_path), nprocs=3)
    ours, theirs = (model_py.restore(tmp_path / name / "checkpoint.pt")["models"] for name in ("parts", "whole"))
    assert len(metrics(tmp_path / "parts")) == 2
    same_weights(ours, theirs)


def test_the_gradient_that_is_not_finite_five_times_in_a_row_ends_the_run_and_what_was_saved_stays(tmp_path):
    patch = "old = module.ppo.policy_loss; module.ppo.policy_loss = lambda *a: old(*a) / 0"
    code, _, err = script("train.py", *TINY, "--agents", "mem1", "--ppo-steps", 9, "--out", tmp_path / "run", patch=patch)
    assert code == 4 and len(err.splitlines()) == 1 and "lower --ppo-lr" in err, err
    assert [row["skipped"] for row in metrics(tmp_path / "run") if row["stage"] == "ppo"] == [6] * 5
    assert set(evaluation.load_run(tmp_path / "run")[1]) == {"primer", "mem1-demos"}


def test_two_processes_do_the_same_as_one(finished, tmp_path):
    code, _, err = script("train.py", *TINY, "--agents", "mem1", "--out", tmp_path / "run", "--nproc", 2)
    assert code == 0, err
    for one, two in zip(metrics(finished[0]), metrics(tmp_path / "run")):
        # Nothing is earned in so short a run, so PPO's gradients are rounding noise: compare what comes before them.
        for key in () if one["stage"] == "ppo" and one["step"] > 1 else ("peak", "turns", "ent") if one["stage"] == "ppo" else one:
            value = pytest.approx(one[key], rel=1e-4) if isinstance(one[key], float) else one[key]
            assert two[key] == value, (key, one, two)


def test_two_machines_under_torchrun_do_the_same_as_one_process(finished, tmp_path):
    port, flags = free_port(), [*map(str, TINY), "--agents", "mem1", "--reward", "judge", "--out", str(tmp_path / "run")]
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node), "--master_addr", "127.0.0.1",
                               "--master_port", str(port), "train.py", *flags], cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}) for node in range(2)]
    (first, second) = ((*node.communicate(timeout=200), node.returncode) for node in nodes)
    assert first[2] == second[2] == 0 and "results in" in first[0] + second[0], (first, second)
    assert ("results in" in first[0]) != ("results in" in second[0])  # one of them prints
    for one, two in zip(metrics(finished[0]), metrics(tmp_path / "run")):
        assert two["stage"] == "judge" or two["stage"] == "ppo" or two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert [row["stage"] for row in metrics(tmp_path / "run")] == ["primer"] * 4 + ["demos"] * 4 + ["judge"] * 4 + ["ppo"] * 4


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL] if THOROUGH else [signal.SIGSTOP])
def test_a_process_that_hangs_or_dies_ends_the_run_with_one_line_and_it_can_be_resumed(tmp_path, number):
    flags = [*TINY, "--agents", "mem1", "--ppo-steps", "60", "--nproc", "2", "--timeout", "5", "--out", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=HERE, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(metrics(tmp_path / "run")) < 12:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    (child,) = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()][-1:]
    os.kill(child, number)
    began = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 6 and len(err.splitlines()) == 1 and "process 1 of 2" in err and "--resume" in err, err
    assert time.time() - began < 60 and not Path(f"/proc/{child}").exists()
    before = len(metrics(tmp_path / "run"))
    code, _, err = script("train.py", "--resume", "--nproc", 2, "--out", tmp_path / "run")
    assert code == 0 and len(metrics(tmp_path / "run")) == 68 > before, err


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_ctrl_c_while_the_processes_start_stops_them_after_the_first_step_without_a_traceback(tmp_path):
    process = subprocess.Popen([sys.executable, "train.py", *TINY, "--nproc", "2", "--out", str(tmp_path / "run")], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not any("spawn_main" in Path(f"/proc/{pid}/cmdline").read_text() for pid in children.read_text().split()):
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "--resume" in out and not err, (process.returncode, out, err)


def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    """Three kills; with PROFILE=thorough, a hundred. Half of them while a checkpoint is being written."""
    draw, kills, run = np.random.default_rng(0), 100 if THOROUGH else 3, 0
    while kills > 0:
        run, out, code = run + 1, tmp_path / str(run), None
        while code != 0:
            flags = ["--out", out, "--resume"] if (out / "checkpoint.pt").exists() or (out / "previous.pt").exists() else [*TINY, "--out", out]
            process = subprocess.Popen([sys.executable, "train.py", *map(str, flags)], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})
            while not (out / "checkpoint.pt").exists() and process.poll() is None:
                time.sleep(0.002)
            at, while_saving = time.time() + draw.uniform(0, 8), draw.random() < 0.5
            while kills > 0 and process.poll() is None and time.time() < at and not (while_saving and (out / "checkpoint.pt.tmp").exists()):
                time.sleep(0.0005)
            if kills > 0 and process.poll() is None:
                process.send_signal(signal.SIGKILL if draw.random() < 0.7 else signal.SIGTERM)
                kills -= 1
            _, err = process.communicate(timeout=100)
            code = process.returncode
            assert code in (0, 143, -signal.SIGTERM, -signal.SIGKILL) and not err, (code, err)
            if code and (out / "metrics.jsonl").exists() and draw.random() < 0.5:
                with open(out / "metrics.jsonl", "a") as file:
                    file.write('{"stage": "pri')  # the power went as well
        assert metrics(out) == metrics(finished[0]) and results(out)[0] == results(finished[0])[0]
        same_weights(evaluation.load_run(out)[1], evaluation.load_run(finished[0])[1])


def same_weights(ours, theirs):
    """Bit for bit."""
    assert list(ours) == list(theirs)
    for name in ours:
        assert all(torch.equal(ours[name][1][key], theirs[name][1][key]) for key in theirs[name][1])


def test_a_full_disk_loses_nothing_that_was_written(finished, tmp_path):
    patch = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))"  # a primer fits, a model with its optimiser does not
    code, _, err = script("train.py", *TINY, "--out", tmp_path / "run", patch=patch)
    assert code == 5 and len(err.splitlines()) == 1 and "File too large" in err and "--resume" in err, err
    assert not list((tmp_path / "run").glob("*.tmp"))
    code, _, err = script("train.py", "--out", tmp_path / "run", "--resume")
    assert code == 0 and metrics(tmp_path / "run") == metrics(finished[0]), err


def test_two_runs_do_not_share_a_directory(tmp_path, monkeypatch, capsys):
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for flags in TINY, ["--sweep", "1"]:
            monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--out", str(tmp_path)])
            with pytest.raises(SystemExit) as exit:
                train.main()
            assert exit.value.code == 2 and "another train.py is at work" in capsys.readouterr().err


class Trap:
    """What a malicious checkpoint would run."""

    def __reduce__(self):
        return os.system, ("touch /tmp/mem1_was_here",)


def with_head(data, **changes):
    return json.dumps({"format": model_py.FORMAT, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **changes}).encode() + b"\n" + data


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A run that was stopped in the midst of PPO: (its directory, its world, bytes of its last checkpoint, what is in the one before)."""
    out = tmp_path_factory.mktemp("files") / "run"
    code, _, err = script("train.py", *TINY, "--ppo-steps", 500, "--out", out, interrupt=(out / "metrics.jsonl", 13, signal.SIGTERM))
    assert code == 143, err
    return out, evaluation.load_run(out)[0], (out / "checkpoint.pt").read_bytes(), model_py.restore(out / "previous.pt")


@MORE
@given(st.data())
def test_of_a_damaged_or_foreign_checkpoint_one_line_is_said_and_the_one_before_is_taken(two_checkpoints, data):
    out, world, whole, before = two_checkpoints
    how = data.draw(st.sampled_from(["cut off", "flipped", "longer", "noise", "foreign", "malicious", "version", "other head"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = {
        "cut off": lambda: whole[:at], "flipped": lambda: whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :], "longer": lambda: whole + b"x",
        "noise": lambda: data.draw(st.binary(max_size=300)), "foreign": lambda: whole[whole.index(b"\n") + 1 :], "malicious": lambda: with_head(pickle.dumps(Trap())),
        "version": lambda: with_head(whole[whole.index(b"\n") + 1 :], format="mem1 checkpoint 0"),
        "other head": lambda: data.draw(st.sampled_from([b"{}", b"[]", b"null", b"1", b'{"format": 1}', b'{"format": "mem1 checkpoint 1", "bytes": "x", "sha256": 0}'])) + b"\n"}[how]()
    (out / "checkpoint.pt").write_bytes(damaged)
    state, told = evaluation.last_state(out, world)
    assert len(told) == 1 and len(told[0].splitlines()) == 1 and "checkpoint.pt" in told[0] and state["stage"] == before["stage"]
    same_weights(state["models"], before["models"])
    assert not Path("/tmp/mem1_was_here").exists()


@MORE
@given(st.integers(0, 99), st.sampled_from(range(14)))
def test_a_checkpoint_whose_contents_do_not_fit_its_run_is_refused_in_one_line(two_checkpoints, place, other):
    """What is in there is right but for one thing, which is replaced by something else; its checksum is right."""
    out, world, whole, before = two_checkpoints
    state = model_py.restore(out / "previous.pt")
    places = [(state, key) for key in state] + [(state["models"], key) for key in state["models"]] + [(state["models"]["primer"], i) for i in (0, 1)]
    places += [(state["models"]["primer"][i], key) for i in (0, 1) for key in state["models"]["primer"][i]]
    places += [(state["best"], 0), (state["best"], 1), (state["optimiser"], "state"), (state["optimiser"], "param_groups"), (state["optimiser"]["param_groups"], 0)]
    places += [(state["optimiser"]["state"], 0), (state["optimiser"]["state"][0], "step"), (state["optimiser"]["state"][3], "exp_avg")]
    holder, key = places[place % len(places)]
    holder[key] = ([-1, 2**62, 0.5, float("nan"), "x", [], {}, True, torch.zeros(3), torch.zeros(()).expand(10**6, 10**6), [1, 2], {"a": 1}, [{}, {}], None])[other]
    (out / "checkpoint.pt").write_bytes(with_head(packed(state)))
    wrong = evaluation.misfit(model_py.restore(out / "checkpoint.pt"), world)
    if wrong is None:  # what could be there as well
        assert (key, type(holder[key])) in (("seconds", float), (0, float), ("best", type(None)), ("models", dict), ("state", dict)) and not holder[key] == {"a": 1}, (key, holder[key])
        return
    _, told = evaluation.last_state(out, world)
    assert len(told) == 1 and len(told[0].splitlines()) == 1 and wrong in told[0]


def packed(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_of_no_checkpoint_that_is_whole_there_is_one_line_and_exit_code_3(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    for name in evaluation.CHECKPOINTS:
        (tmp_path / "run" / name).write_bytes(b"x")
    for module, name, code in (train, "train.py", 3), (evaluation, "eval.py", None):
        monkeypatch.setattr(sys, "argv", [name, *["--resume", "--nproc", "1", "--out"][: 4 * (module is train)], str(tmp_path / "run")])
        with pytest.raises(SystemExit) as exit:
            module.main()
        line = capsys.readouterr().err.strip() or exit.value.code
        assert "previous.pt" in line and len(line.splitlines()) == 1 and code in (None, exit.value.code)


def parsed(*flags):
    """(Config or None, exit code, lines on stderr) of train.py's command line."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        try:
            return train.parse_arguments()[0], None, []
        except SystemExit as exit:
            return None, exit.code, (exit.code if isinstance(exit.code, str) else said.getvalue()).splitlines()


VALUES = ("0 1 2 3 7 -1 1000 100000000000000000000 0.5 -0.5 1e-300 1e400 nan inf x mem1 full qa web shop em list chain count debug gpu paper cpu cuda auto bfloat16 "
          "/ /dev/null /nonexistent envs.py runs #64 é").split() + ["", " ", "\udcff", "a" * 300]


@MORE
@given(st.lists(st.tuples(st.sampled_from([f.name for f in dataclasses.fields(train.Config)] + ["no-such-flag", "h e l p"]), st.lists(st.sampled_from(VALUES), max_size=3)), min_size=1, max_size=3))
def test_any_command_line_is_taken_or_refused_in_one_line(flags):
    cfg, code, lines = parsed(*(word for name, values in flags for word in ("--" + name.replace("_", "-"), *values)))
    if cfg is None:
        assert code not in (0, None) and len(lines) == 1, (code, lines)
        return
    assert cfg.n_embd * cfg.n_layer > 0  # what is taken can be played
    for n in {*cfg.objectives, *cfg.eval_objectives}:
        assert train.world(cfg, cfg.seed, 0, 0, 0, n).prompt


@MORE
@given(st.sampled_from([f.name for f in dataclasses.fields(train.Config)]), st.sampled_from([None, -1, 10**30, 0.5, float("nan"), "x", [], [1], ["x"], {}, True, [1, 2]]))
def test_a_configuration_that_was_tampered_with_is_taken_or_refused_in_one_line(two_checkpoints, name, value):
    out = two_checkpoints[0]
    whole = (out / "config.json").read_text()
    fields = json.loads(whole)
    fields["config"][name] = value
    (out / "config.json").write_text(json.dumps(fields))
    cfg, code, lines = parsed("--resume", "--out", out)
    (out / "config.json").write_text(whole)
    if cfg is None:
        assert code == 2 and len(lines) == 1 and (name.replace("_", "-") in lines[0].replace("_", "-") or "expected" in lines[0]), lines
    else:
        assert all(train.world(cfg, 0, 0, 0, 0, n).prompt for n in {*cfg.objectives, *cfg.eval_objectives})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"config": 1}', '{"config": {}}', "\x00"])
def test_what_is_not_a_configuration_is_refused_in_one_line(two_checkpoints, text):
    out = two_checkpoints[0]
    whole = (out / "config.json").read_text()
    (out / "config.json").write_text(text)
    _, code, lines = parsed("--resume", "--out", out)
    with pytest.raises(SystemExit, match="config.json"):
        evaluation.load_run(out)
    (out / "config.json").write_text(whole)
    assert code == 2 and len(lines) == 1 and "config.json" in lines[0]


@pytest.mark.parametrize("preset", ["gpu", "paper"])
def test_the_large_presets_take_their_first_steps_at_reduced_width_with_products_in_bfloat16(preset, tmp_path):
    flags = f"--preset {preset} --agents mem1 --n-layer 2 --n-embd 32 --n-head 2 --primer-steps 1 --primer-batch 8 --demos-steps 1 --demos-batch 4 --demos-primer 4 --ppo-steps 1 --ppo-batch 8 --ppo-primer 4 --eval-episodes 2 --valid-episodes 2 --eval-objectives 1 2 --dtype bfloat16 --nproc 1".split()
    code, _, err = script("train.py", *flags, "--out", tmp_path / "run")
    assert code == 0, err
    rows = metrics(tmp_path / "run")
    assert [row["stage"] for row in rows] == ["primer", "demos", "ppo"] and all(row["skipped"] == 0 for row in rows) and rows[-1]["gap"] < 0.05


@pytest.mark.skipif(not THOROUGH, reason="compiling takes minutes")
def test_a_compiled_run_is_the_same_but_for_rounding(finished, tmp_path):
    process = subprocess.run([sys.executable, "train.py", *TINY, "--agents", "mem1", "--compile", "--out", str(tmp_path / "run")], cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0
    for one, two in zip(metrics(finished[0]), metrics(tmp_path / "run")):
        assert one["stage"] == "ppo" or two["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize("flags, words", [
    (["--objectiv", "3"], "unrecognized"), (["--preset", "huge"], "invalid choice"), (["--ppo-lr", "fast"], "invalid float"),
    (["--device", "cuda"], "no GPU"), (["--resume", "--out", "/nonexistent/run"], "no checkpoint"),
    (["--objectives", "3"], "objectives"), (["--objectives", "4", "2"], "objectives"), (["--hops", "1", "9"], "hops"),
    (["--ppo-batch", "0"], "ppo-batch"), (["--nproc", "2", "--ppo-batch", "1"], "ppo-batch"),
    (["--start", "/nonexistent/run"], "does not exist"), (["--layout", "flat"], "invalid choice"),
    (["--facts", "/nonexistent.tsv"], "--facts"), (["--kinds", "riddle"], "invalid choice"), (["--kinds", "list,riddle"], "invalid choice"), (["--objectives", "1,x"], "invalid int"),
    (["--kinds", "count", "--facts", str(HERE / "assets" / "countries.tsv")], "no other kinds"), (["--env", "shop", "--kinds", "chain"], "no other kinds"), (["--sweep", "-1"], "--sweep -1"), (["--sweep", "--seed", "3"], "leave --seed away"), (["--sweep", "--resume"], "leave --resume away"),
    (["--agents", "mem1", "mem1"], "only once"), (["--agents", "nobody"], "invalid choice"), (["--eval-objectives", "500"], "eval-objectives"), (["--n-embd", "50"], "n-embd"),
    (["--ppo-minibatches", "65"], "--ppo-minibatches"), (["--kinds", "list", "count", "--hops", "1", "1", "--objectives", "1", "80"], "expected 1 to 79"), (["--out", "/proc/run"], "/proc/run")])
def test_bad_input_gets_one_line_and_a_non_zero_exit(flags, words, monkeypatch, capsys):
    if flags[:2] == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as exit:
        train.main()
    message = exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err
    assert exit.value.code not in (0, None) and words in message and len(message.splitlines()) == 1, message


def test_a_run_is_neither_overwritten_nor_resumed_as_another(finished, monkeypatch, capsys):
    for flags, words in ([], "holds a run already"), (["--resume", "--seed", "7"], "began with 0"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "debug", "--out", str(finished[0]), *flags])
        with pytest.raises(SystemExit) as exit:
            train.main()
        assert words in (exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err)


def test_items_of_a_list_stand_between_spaces_or_commas(monkeypatch):
    lists = [["--kinds", "list", "count", "chain", "--objectives", "1", "3"], ["--kinds", "list,count,chain", "--objectives", "1,3"], ["--kinds", "list,count", "chain", "--objectives", "1", "3"]]
    given = []
    for flags in lists:
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", "runs/none", *flags])
        given.append(train.parse_arguments()[1])
    assert given[0] == given[1] == given[2] and given[0]["kinds"] == ["list", "count", "chain"] and given[0]["objectives"] == [1, 3]


@pytest.mark.parametrize("flags, words", [
    (["--threads", "0"], "at least 1"), (["--episodes", "-1"], "at least 1"), (["--device", "abacus"], "expected cpu"), (["--objectives", "0"], "invalid"),
    (["--objectives", "81"], "invalid"), (["--policies", "mem1,nobody"], "the run has mem1"), (["--assets", "x"], "goes with --table"), (["--peers"], "goes with --bench"),
    (["--memory", "--kinds", "count"], "holds none"), (["--ask", ""], "invented world"), (["--kinds", "riddle"], "expected list, chain"), (["--env", "shop", "--kinds", "count"], "no other kinds")])
def test_bad_input_to_the_evaluation_gets_one_line_too(finished, flags, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", str(finished[0]), *flags])
    with pytest.raises(SystemExit) as exit:
        evaluation.main()
    message = capsys.readouterr().err
    assert exit.value.code == 2 and words in message and len(message.splitlines()) == 1, message


def test_evaluation_of_what_is_not_a_run_gets_one_line(tmp_path, monkeypatch):
    for flags in ([str(tmp_path)], [str(tmp_path / "none")], ["--compare", str(tmp_path)], ["--table", str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", ["eval.py", *flags])
        with pytest.raises(SystemExit, match="does not exist; expected the directory of a run"):
            evaluation.main()


def test_every_test_and_flag_that_the_readme_names_exists():
    text, source = (HERE / "README.md").read_text(), Path(__file__).read_text()
    names = re.findall(r"`(test_\w+?)(?:_?\.\.\.)?`", text)
    assert len(names) > 8 and all(f"def {name}" in source for name in names), names
    flags = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(train.Config)} | set(re.findall(r'"(--[a-z]+)"', (HERE / "eval.py").read_text()))
    elsewhere = {"--index-url", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}  # of pip and torchrun
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= flags | elsewhere


def test_the_readme_shows_what_was_measured():
    text, one = (HERE / "README.md").read_text(), json.loads((HERE / "assets" / "results.json").read_text())
    shown = dict(re.findall(r"<!-- table: (.+?) -->\n\n(.*?)\n\n<!-- end -->", text, re.S))
    tables = evaluation.report(one)
    assert len(shown) > 5 and all(tables[name] == table for name, table in shown.items())


@pytest.mark.parametrize("module", [envs, model_py, mem1, ppo, train, evaluation], ids=lambda m: m.__name__)
def test_the_examples_in_the_docstrings_hold(module):
    failed, _ = doctest.testmod(module)
    assert failed == 0


# ----------------------------------------------------------------------------------------------
# The test of the tests. Each mutant is a bug that somebody has had (the paper's code, other published ones, or this
# project on its way), put back in: a wrapper around a function; and the property that has to notice.


def agree():
    test_sampler_learner_and_token_by_token_replay_agree.hypothesis.inner_test(mem1.mem1, [6, 4, 5, 6], 0, 8192)


def once():
    test_what_the_agent_wrote_is_trained_exactly_once_and_what_it_was_given_never.hypothesis.inner_test(mem1.mem1, [6, 4, 5], 0)


def own_row(p):
    p.at += 1
    return p


def info_row(p):
    p.at -= (p.ids[0, p.at] == IS).long()
    return p


def torn(p):
    """True for the tokens whose parent does not stand right before them: the first of a task, and of a branch but its trajectory's first."""
    return p.before[2] != torch.arange(p.ids.numel())


def shifted(p):
    start = (torn(p) & (p.ids[0] == IS)).int().cummax(0).values.bool()  # from the second branch on
    p.pos[0, start] += 5
    return p


def cut(p):
    for j, places in enumerate(p.before):
        places[places != torch.arange(len(places)) - 2 + j] = 0
    return p


def padding_seen(p):
    p.rectangles = [(queries, keys, see | ~see.any(1, keepdim=True)) for queries, keys, see in p.rectangles]
    return p


def mark(traj, result, which, value):
    traj.branches[-1].trained[which] = [value] * len(traj.branches[-1].trained[which])
    return result


def rotate_worlds(trajs):
    for traj, env in zip(trajs, [t.env for t in trajs[1:] + trajs[:1]]):
        traj.env = env
    return trajs


def pass_means(work):
    sizes = [len(p.target) for p, _ in work]
    return [(p, lambda *args, loss=loss, n=n: loss(*args) * sum(sizes) / max(1, n) / len(work)) for (p, loss), n in zip(work, sizes)]


def used_up(packs, trajs):
    trajs[0].branches[0].ids.append(END)
    return packs


MUTANTS = {  # name: (object, its function, the wrapper of that function, the property that notices)
    "a mask of 0 and 1 is added to the scores": (model_py, "attend", lambda f: lambda q, k, v, bias: f(q, k, v, (bias == 0).to(bias)), agree),
    "the learner does not see the previous state":
        (mem1, "pack", lambda f: lambda trajs, *a, **k: f([mem1.stitched(t, released=True) for t in trajs], *a, **k), agree),
    "the learner sees one copy of every token": (mem1, "pack", lambda f: lambda trajs, *a, **k: f(list(map(mem1.stitched, trajs)), *a, **k), agree),
    "a token is predicted by its own row": (mem1, "_collate", lambda f: lambda *a: own_row(f(*a)), agree),
    "the first token of a turn is predicted by the row of an info": (mem1, "_collate", lambda f: lambda *a: info_row(f(*a)), agree),
    "positions go on where something was pruned": (mem1, "_collate", lambda f: lambda *a: shifted(f(*a)), agree),
    "a branch's convolution does not see the end of the task": (mem1, "_collate", lambda f: lambda *a: cut(f(*a)), agree),
    "padding of a shorter context is seen": (mem1, "_collate", lambda f: lambda *a: padding_seen(f(*a)), agree),
    "after pruning, the sampler's convolution still sees": (Cache, "rollback", lambda f: lambda self, rows: setattr(self, "prompt_tail", self.tail.clone()) or f(self, rows), agree),
    "rows change places and their lengths do not": (Cache, "keep", lambda f: lambda self, stays: (n := self.n.clone(), f(self, stays), setattr(self, "n", n))[1], agree),
    "sampled at temperature 0.9, recorded at 1": (mem1, "sample", lambda f: lambda logits, u=None: (ids := f(logits / 0.9, u)[0], logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]),
        lambda: test_what_is_recorded_is_the_probability_with_which_the_token_was_drawn()),
    "what is given is trained as well": (Branch, "extend", lambda f: lambda self, ids, trained, *a, **k: f(self, ids, True, *a, **k), once),
    "a state read again is trained again": (Trajectory, "open_turn", lambda f: lambda self, policy: mark(self, f(self, policy), slice(0, 3), True), once),
    "the end of a turn is not trained": (Trajectory, "close_turn", lambda f: lambda self, *a, **k: mark(self, f(self, *a, **k), slice(-1, None), False), once),
    "what is read counts in the advantages": (mem1, "recorded", lambda f: lambda trajs, name: [x for t in trajs for b in t.branches for x in getattr(b, name)], once),
    "what was written goes through text": (Trajectory, "close_turn", lambda f: lambda self, ids, *a, **k: f(self, ENC.encoding.encode(ENC.decode(ids), allowed_special="all"), *a, **k),
        lambda: test_tokens_go_from_the_sampler_to_the_learner_without_a_detour_through_text()),
    "packing uses its input up": (mem1, "pack", lambda f: lambda trajs, *a, **k: used_up(f(trajs, *a, **k), trajs), lambda: test_packing_leaves_its_input_as_it_was()),
    "an episode is paid the reward of its neighbour": (mem1, "rollout", lambda f: lambda *a, **k: rotate_worlds(f(*a, **k)),
        lambda m: test_each_episode_is_paid_its_own_reward_at_its_own_last_token(m)),
    "what a turn earned is paid a turn late": (Trajectory, "rewards", lambda f: lambda self, kind="em": np.roll(f(self, kind), 1).tolist(),
        lambda m: test_a_turn_that_earns_is_paid_at_its_own_last_token(m)),
    "the judge prefers the worse": (train, "optimise", lambda f: lambda learner, o, cfg, work: f(learner, o, cfg, [(p, lambda *a, loss=loss: -loss(*a)) for p, loss in work]),
        lambda m: test_the_judge_climbs_the_likelihood_of_the_preferences(m, 10**6)),
    "the loss is a mean in each pass": (train, "optimise", lambda f: lambda learner, o, cfg, work: f(learner, o, cfg, pass_means(work)),
        lambda m: test_the_split_into_passes_does_not_change_the_gradient(m, "tree")),
    "advantages run on into the next episode": (ppo, "gae", lambda f: lambda r, v, last, *a: f(r, v, torch.arange(len(last)) == len(last) - 1, *a),
        lambda: test_gae_is_the_double_sum_of_its_definition.hypothesis.inner_test([3, 2], 0.9, 0.9, 0)),
    "the clip acts in both directions": (ppo, "policy_loss", lambda f: lambda logp, old, adv, clip: -(logp - old).exp().clamp(1 - clip, 1 + clip) * adv,
        lambda: test_the_clip_stops_the_gradient_where_the_ratio_has_gone_far_enough_and_only_there(0.7, 1, True)),
    "whitening divides by nothing": (ppo, "whiten", lambda f: lambda x, *a: (x - x.mean()) / x.var(unbiased=False).sqrt(),
        lambda: test_whitening_is_over_all_tokens_and_survives_constants()),
    "the KL is estimated by the difference alone": (ppo, "approx_kl", lambda f: lambda logp, old: old - logp, lambda: test_k3_estimates_the_exact_kl()),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name, monkeypatch):
    owner, function, wrap, notices = MUTANTS[name]
    old = getattr(owner, function)
    new = wrap(old)
    for holder in owner, mem1, train, evaluation, sys.modules[__name__]:  # also where it was imported to
        if getattr(holder, function, None) is old:
            monkeypatch.setattr(holder, function, new)
    with pytest.raises(AssertionError):
        notices(*[monkeypatch] * notices.__code__.co_argcount)


def test_a_resumed_run_that_is_off_by_one_draw_is_caught(finished, tmp_path, monkeypatch):
    patch = "old = module.exercise; module.exercise = lambda cfg, step, i, n: old(cfg, step + cfg.resume, i, n)"
    honest = script
    monkeypatch.setattr(sys.modules[__name__], "script", lambda *a, **k: honest(*a, **k, patch=patch))
    with pytest.raises(AssertionError):
        test_an_interrupted_run_resumed_equals_the_uninterrupted_one(finished, tmp_path, 2, signal.SIGINT)
