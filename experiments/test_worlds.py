"""test_worlds.py: what must be true of every world, each played by its demonstrator.

    python -m pytest -q experiments/test_worlds.py
"""
import doctest
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import envs
from experiments import layouts
from mem1 import turn_cap

NAMES = ["qa", "web", "count", "shop", "cue"]


def make(name, n, seed):
    return envs.world(name)(n, (1, 4), [seed])


def play(env, keep_all=False, amnesic=False, rng=None):
    """The turns of the demonstrator's episode; it sees its last turn, or all turns so far.

    amnesic: of its last state it sees no answer and no product, only what it is about.
    rng: for random notes.
    """
    turns = []
    while not env.done:
        seen = "".join(turns if keep_all else turns[-1:])
        if amnesic:
            seen = re.sub(r"; [^:]*?(?=(#\d+ )?:)|(?<=<IS> )#[^<]*", "; ", seen)
        state, kind, text = env.random_notes(seen, rng) if rng else env.expert(seen, keep_all)
        assert 3 + len(f"{state} {text}".split()) <= turn_cap(env), "more than an agent may write"
        turns.append(f"<IS> {state}<{kind}> {text}<end><info>{env.step(kind, text)}")
    return turns


def test_examples_in_docstrings_are_right():
    modules = [layouts, *(sys.modules[envs.world(name).__module__] for name in NAMES)]
    assert not any(doctest.testmod(module).failed for module in modules)


def test_the_search_tool_ranks_as_a_slow_bm25_does():
    env = envs.ComposedQA(8, (2, 2), seed=5)
    texts = env.engine.texts
    pages = [[fact.split()[0], *fact.split()] for fact in texts]  # the title counts twice

    def score(page, word):
        df, tf = sum(word in other for other in pages), page.count(word)
        return np.log((len(pages) + 1) / (df + 0.5)) * tf * 2.2 / (tf + 1.2)

    for fact in texts:
        a, b, _ = fact.split()
        best = sorted(range(len(pages)), key=lambda i: -score(pages[i], a) - score(pages[i], b))[:3]
        assert env.search(f"{a} {b}") == [texts[i] for i in sorted(best)]
    assert env.search("?!") == env.search("nobody knows") == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_demonstrator_succeeds_in_both_contexts_and_only_with_memory(name, n):
    tokens = {*envs.WORDS, *envs.world(name).extra_words}  # nothing of a task has to be spelled
    forgotten = 0
    for seed in range(10):
        for keep_all in False, True:
            env = make(name, n, seed)
            assert set(env.prompt.split()) <= tokens
            turns = play(env, keep_all)
            assert turns == play(make(name, n, seed), keep_all), "not the same by the same seed"
            best = n * env.worth(env.golds[0][0], env.color) if name == "shop" else n
            assert (env.cause, env.em) == ("answered", best)
        control = make(name, n, seed)
        play(control, amnesic=True)
        forgotten += env.em - control.em
    assert forgotten > 5 or n == 1


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(st.sampled_from(NAMES), st.text(), st.text(), st.integers(1, 5),
       st.sampled_from(["query", "answer", "malformed", "", "reset"]))
@example("qa", " jelo heir" * 10**5, " #1 jelo" * 10**5, 2, "answer")
@example("qa", "<end> \n\x00\ud800", envs.entries(dict(make("qa", 2, 2).golds)), 2, "malformed")
def test_no_action_crashes_a_world_and_only_an_answer_is_paid(name, first, second, n, kind):
    env = make(name, n, n)
    env.step("query", first)
    assert len(env.step(kind, second)) < 500
    assert env.done == (kind != "query") and 0 <= env.em <= (n if kind == "answer" else 0)
    while not env.done:
        env.step("query", first)
    assert kind != "query" or env.turn == env.max_turns


def test_the_web_is_shared_and_asks_for_second_tries_and_opened_pages():
    assert make("web", 4, 1).engine is make("web", 4, 2).engine
    episodes = "".join(turn for seed in range(20) for turn in play(make("web", 4, seed)))
    assert min(episodes.count("nothing found"), episodes.count("<query> page")) > 5


def test_the_reward_of_the_shop_is_the_share_of_what_was_wanted():
    env = make("shop", 8, 3)
    _, wanted_kind, *wanted_traits, _, wanted_color, _, limit, _ = env.prompt.split()
    for index, (kind, traits, colors, price) in env.products.items():
        for color in colors:
            env = make("shop", 8, 3)
            assert f"{' '.join(traits)} in" in env.step("query", f"click {index}")
            assert f"chosen {color}" in env.step("query", f"click {color}")
            env.step("answer", "buy")
            right = [trait in traits for trait in wanted_traits]
            right += [color == wanted_color, price <= int(limit[1:])]
            assert env.em == (8 * sum(right) / 4 if kind == wanted_kind else 0.0)
    env = make("shop", 8, 3)
    env.step("query", "click red")  # control: no product is open
    env.step("answer", "buy")
    assert env.em == 0.0


@pytest.mark.parametrize("is_random", [True, False])
def test_what_the_random_shopper_remembers_does_not_depend_on_what_is_wanted(is_random):
    kept = {True: [], False: []}  # is the new product better? -> is it the one remembered?
    for seed in range(200):
        rng = np.random.default_rng(seed) if is_random else None
        before = []
        for turn in play(make("shop", 6, seed), rng=rng):
            look, best = (part.split() for part in re.findall(r"> (.*?); ?(.*?) ?:", turn)[0])
            if look and before and look[0] != before[0] and best in (look, before):
                kept[len(look) > len(before)].append(best == look)
            before = best
    expected = pytest.approx([0.5, 0.5], abs=0.1) if is_random else [1.0, 0.0]
    assert [np.mean(kept[True]), np.mean(kept[False])] == expected


def test_in_haste_the_demonstrator_buys_the_product_that_it_remembers():
    for seed in range(10):
        env = make("shop", 8, seed)
        env.max_turns = 8
        best = play(env)[-1].split("; ")[1].split()[0]
        assert env.cause == "answered" and best == env.open
