"""shop.py: WebShop (arXiv 2207.01206) in miniature: find the product that fits best, and buy it.

    python train.py --env shop --around 0 --objectives 1 6 --out runs/shop

Here N is not a number of questions: it is the number of products of the wanted type. There are half
as many others. So the agent has to remember one product, the best so far, not all that it has seen.
"""
import re

import numpy as np

from envs import INDICES, LIST, Env, words

SHOP_WORDS = "want under search click next end chosen buy in nothing happens".split()
TYPES = "jacket shirt lamp chair bag clock rug mug".split()
TRAITS = "cotton warm light round small soft matt thin plain strong old new".split()
COLORS = "red blue green black white grey".split()
PAGE = 2  # products a page: so few that short tasks have several pages, too


class World(Env):
    """Find and buy the product that fits best among N of its type.

    >>> env = World(2, seed=2)
    >>> env.prompt
    ' want lamp warm small in white under #50 .'
    >>> env.step("query", "search lamp strong")
    ' left=9 #14 lamp #0 , #70 lamp #20 , end'
    >>> env.step("query", "click #70")
    ' left=8 #70 lamp small warm new in white black green #20'
    >>> env.step("query", "click white"), env.step("answer", "buy"), env.em
    (' left=7 chosen white', '', 2.0)

    Queries are `search words`, `next` (page of what was found), `click #id` of a product and `click
    color` of the product that is open. Anything else does nothing. The only answer is `buy`.

    products  {id: (type, traits, colors, price)}
    golds     [(id of the best product, "")]
    em        N times the reward of WebShop, see worth(); so em / N is that reward
    """

    longest = len(INDICES) * 2 // 3  # with half as many other products, each of which has an index
    needs = {"around": 0}
    extra_words = [*SHOP_WORDS, *TYPES, *TRAITS, *COLORS]

    def __init__(self, n_objectives=2, hops=(1, 2), seed=0):
        super().__init__(n_objectives, 2 * n_objectives + 6)
        rng = np.random.default_rng(seed)
        self.type, *others = pick(rng, TYPES, 4)
        self.traits = pick(rng, TRAITS, 2)
        self.color = pick(rng, COLORS, 1)[0]
        self.limit = 10 * int(rng.integers(3, 6))
        what = f"{self.type} {' '.join(self.traits)} in {self.color}"
        self.prompt = f" want {what} under #{self.limit} ."

        # N products of the type and N / 2 others, anything about them drawn at random.
        ids = pick(rng, INDICES, n_objectives + n_objectives // 2)
        self.products = {}
        for i, index in enumerate(ids):
            kind = self.type if i < n_objectives else str(rng.choice(others))
            traits, colors = pick(rng, TRAITS, 3), pick(rng, COLORS, 3)
            self.products[index] = kind, traits, colors, 10 * int(rng.integers(8))

        # In half of the episodes one of them has all that is wanted.
        if rng.random() < 0.5:
            trait = pick(rng, [trait for trait in TRAITS if trait not in self.traits], 1)
            colors = pick(rng, [color for color in COLORS if color != self.color], 2)
            index = pick(rng, ids[:n_objectives], 1)[0]
            traits = pick(rng, [*self.traits, *trait], 3)
            colors = pick(rng, [self.color, *colors], 3)
            price = 10 * int(rng.integers(self.limit // 10 + 1))
            self.products[index] = self.type, traits, colors, price

        self.shelf = pick(rng, ids, len(ids))  # the order in which a search finds them
        self.results = []  # what was found and is not on an earlier page
        self.open = None  # the product that was clicked last,
        self.chosen = None  # and its color, if that was clicked
        worths = {index: self.worth(index, self.color) for index in self.products}
        self.golds = [(max(worths, key=worths.get), "")]

    def worth(self, index, color):
        """The reward of WebShop for a product in a color, 0..1; 0 for one of another type.

        It is the share of what is wanted that is right: two traits, the color, the price.
        """
        kind, traits, colors, price = self.products[index]
        if kind != self.type:
            return 0.0
        right = [trait in traits for trait in self.traits]
        right += [color == self.color and color in colors, price <= self.limit]
        return sum(right) / 4

    def act(self, text):
        verb, what = (words(text) + ["", ""])[:2]
        if verb == "click" and what in self.products:
            self.open = what
            self.chosen = None
            kind, traits, colors, price = self.products[what]
            return f"{what} {kind} {' '.join(traits)} in {' '.join(colors)} #{price}"
        if verb == "click" and self.open and what in self.products[self.open][2]:
            self.chosen = what
            return f"chosen {what}"
        if verb == "search":
            self.results = self.search(words(text)[1:9])
        elif verb == "next":
            self.results = self.results[PAGE:]
        else:
            return "nothing happens"

        page = []
        for index in self.results[:PAGE]:
            kind, _, _, price = self.products[index]
            page.append(f"{index} {kind} #{price}")
        return " , ".join([*page, "next" if self.results[PAGE:] else "end"])

    def search(self, query):
        """The products that fit a word of the query or more, those that fit most words first."""
        matches = {}
        for index in self.shelf:
            kind, traits, _, _ = self.products[index]
            matches[index] = sum(word in (kind, *traits) for word in query)
        found = [index for index in self.shelf if matches[index]]
        return sorted(found, key=matches.get, reverse=True)  # reverse keeps the order of equals

    def grade(self, text):
        if self.open and words(text) == ["buy"]:
            return self.n_objectives * self.worth(self.open, self.chosen)
        return 0.0

    def random_notes(self, seen, rng):
        """The demonstrator, but a coin toss decides whether it remembers the product just seen."""
        return self.expert(seen, rng=rng)

    def expert(self, seen, fresh=False, rng=None):
        """The demonstrator: looks at products of the type, remembers the best, and buys it.

        Its state says what the product just seen has of what is wanted, then the same of the best
        product so far, then what is left of this page to look at, and how the page ends:

            #12 warm red under ; #9 warm : #17 next

        fresh changes nothing: it writes nothing that could be left out. rng: for random_notes().
        """
        form = r" want (\w+) ([\w ]+) in (\w+) under #(\d+)"
        kind, traits, color, limit = re.match(form, self.prompt).groups()
        wanted = [*traits.split(), color, "under"]

        turns = re.findall(r"([^<>]*)<query>[^<]*<end><info>([^<]*)", seen)
        state, info = turns[-1] if turns else ("", "")
        match = re.search(r"; ?([^;:]*) ?: ?(.*)", state)
        best, todo = (part.split() for part in match.groups()) if match else ([], [])

        # The last observation is a product, or a page of products, or nothing new.
        look = []
        product = re.search(r"(#\d+) (\w+) ([\w ]+) in ([\w ]+) #(\d+)", info)
        if product:
            has = [*product[3].split(), *product[4].split()]
            if int(product[5]) <= int(limit):
                has.append("under")
            look = [product[1], *(word for word in wanted if word in has)]
            switch = (len(look) > len(best)) if rng is None else (rng.random() < 0.5)
            if product[2] == kind and switch:
                best = look
        elif re.search(r"(next|end)$", info):
            listed = re.findall(r"(#\d+) (\w+) #\d+", info)
            todo = [index for index, its_kind in listed if its_kind == kind]
            todo += info.split()[-1:]

        # Stop looking if none can be better, or if it is time to go back to the best.
        left = int((re.findall(r"left=(\d+)", info) + ["99"])[0])
        if len(best) > len(wanted) or left <= 3:
            todo = ["end"]

        chosen = "chosen" in info
        at_best = chosen or best[:1] == look[:1]  # the best product is the one that is open
        ready = not best or chosen or (at_best and color not in best)
        action = "query", f"search {kind}"
        if left == 1 or (todo == ["end"] and ready):
            action = "answer", "buy"
            todo = ["end"]
        elif todo == ["end"]:
            action = "query", f"click {color if at_best else best[0]}"
        elif todo == ["next"]:
            action = "query", "next"
        elif todo:
            action = "query", f"click {todo[0]}"
            todo = todo[1:]
        return " ".join([*look, LIST, *best, ":", *todo]), *action


def pick(rng, pool, n):
    """n different words of a pool."""
    return [str(word) for word in rng.choice(pool, n, replace=False)]
