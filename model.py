"""model.py: a small GPT with a value head, in raw PyTorch, and the two kinds of past it can look back on.

    B batch, T new tokens, L tokens to look back on (new ones included), C channels, nh heads, hs head
    size, V vocabulary

One `forward` serves both sides of reinforcement learning, so that they cannot disagree:
    the sampler   looks back on a `Cache`: static buffers, written in place, rolled back to the prompt
    the learner   looks back on a `Prefix`: the prompt's keys and values, kept differentiable
At the end: how a model is kept in a file, such that no crash, no full disk and no flipped bit goes unseen.

Differs from GPT-2, each because half a million weights have to learn to look things up in minutes:
1) a causal convolution of width 4 before q, k, v (a "Canon layer", arXiv 2512.17351): a token sees
   the three before it without spending a head on that. It is what makes lookup quick to learn;
2) rotary positions (arXiv 2104.09864) on part of each head; no learned positions, no biases;
3) squared ReLU (arXiv 2109.08668); embeddings tied with the output and normed on the way in.
"""
import contextlib
import hashlib
import io
import json
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

WIDTH = 4  # of the convolution: a token and the three before it


@dataclass
class GPTConfig:
    vocab_size: int
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 96


class GPT(nn.Module):
    """Decoder-only transformer. forward() gives hidden states; logits() and value() read them."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}"
        self.config = config
        C = config.n_embd
        self.hs = C // config.n_head
        self.half = False  # matrix products in bfloat16; weights, softmax, logits, values and losses in float32 all the same
        self.rope = self.hs // 3 * 2 // 2 * 2  # channels of a head that carry the position: two thirds, an even number
        self.emb = nn.Embedding(config.vocab_size, C)
        self.ln_in, self.ln_out = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.value_head = nn.Linear(C, 1)
        nn.init.normal_(self.emb.weight, std=C**-0.5)  # tied: a token's logit on its own embedding starts at sqrt(C)
        nn.init.zeros_(self.value_head.weight)  # V = 0 at first: advantages start as plain returns
        nn.init.zeros_(self.value_head.bias)

    def forward(self, ids, pos, past, n=None):
        """Hidden states (B, T, C) of new tokens `ids` (B, T) at positions `pos` (B, T) after `past`.

        n (B,): how many of the T tokens are real, the rest is padding on the right; None: all are.
        Padding can not be seen by any real token, since it stands after them all.
        """
        with torch.autocast(ids.device.type, torch.bfloat16) if self.half else contextlib.nullcontext():
            x = self.ln_in(self.emb(ids))  # (B, T, C)
            angle = pos[..., None] * self._frequencies(x)  # (B, T, rope/2)
            rotation = angle.cos()[:, None], angle.sin()[:, None]  # each (B, 1, T, rope/2)
            bias = past.mask(ids.size(1), ids.device).logical_not().to(x.dtype) * -1e9  # (B or 1, 1, T, L); True may attend -> 0
            for i, block in enumerate(self.blocks):
                x = block(x, rotation, bias, past, i, n)  # (B, T, C)
            past.advance(ids.size(1) if n is None else n)
            return self.ln_out(x)  # (B, T, C)

    def logits(self, x):
        """(..., C) -> (..., V). The row at t predicts ids[t+1]."""
        return F.linear(x, self.emb.weight)

    def value(self, x):
        """(..., C) -> (...): what the rest of the episode is expected to earn.

        Adam moves every weight by about lr at every step, however noisy the returns, and the sum of C of
        them by up to C lr. Scaled down, the value adds less noise of its own to the advantages.
        """
        return self.value_head(x).squeeze(-1) * x.size(-1) ** -0.5

    def _frequencies(self, like):
        return 10000.0 ** (-torch.arange(0, self.rope, 2, device=like.device, dtype=like.dtype) / max(1, self.rope))  # (rope/2,)


class Block(nn.Module):
    """x + attention(conv(norm(x))), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.taps = nn.Parameter(torch.randn(WIDTH, C) * 0.1)  # of the convolution; the last is for the token itself
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
        for linear, gain in (self.qkv, 1.0), (self.proj, 0.3), (self.up, 1.0), (self.down, 0.3):
            nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
        # A head start for lookup (after arXiv 2305.09828): queries match like keys, half of which is the token
        # before, and what is read is written as it is. "After the same word as mine" is then nearly there.
        q, k, v = self.qkv.weight.data.chunk(3)  # each (C, C)
        k.copy_(q)
        self.taps.data[-2] += 0.5
        self.proj.weight.data.copy_(0.3 * v.T)

    def forward(self, x, rotation, bias, past, i, n):
        wide = past.with_tail(i, self.ln_1(x), n)  # (B, 3+T, C): the last three inputs of the past, then the new ones
        q, k, v = self.heads(wide, rotation)  # each (B, nh, T, hs)
        k, v = past.extend(i, k, v)  # each (B, nh, L, hs)
        return self.output(x, q, k, v, bias)  # (B, T, C)

    def heads(self, wide, rotation):
        B, T = wide.size(0), wide.size(1) - WIDTH + 1
        h = wide[:, WIDTH - 1 :] + sum(wide[:, j : j + T] * self.taps[j] for j in range(WIDTH))  # (B, T, C)
        q, k, v = self.qkv(h).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        return rotate(q, rotation), rotate(k, rotation), v

    def output(self, x, q, k, v, bias):
        x = x + self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))  # (B, T, C)
        return x + self.down(F.relu(self.up(self.ln_2(x))).square())

    def compile(self):
        """Fuse what has no side effects; the past is left out."""
        self.heads, self.output = torch.compile(self.heads, dynamic=True), torch.compile(self.output, dynamic=True)


def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(hs) + bias) v. q (B, nh, T, hs), k and v (B, nh, L, hs), bias (B or 1, 1, T, L)."""
    att = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1) + bias  # (B, nh, T, L)
    return att.softmax(-1) @ v  # (B, nh, T, hs)


def rotate(x, rotation):
    """Rotary position embedding of the first channels of x (B, nh, T, hs); the rest sees no position."""
    cos, sin = rotation  # each (B, 1, T, r)
    r = cos.size(-1)
    a, b, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)  # (B, nh, T, hs)


# ----------------------------------------------------------------------------------------------
# What the new tokens may look back on. Both kinds answer the same five calls of forward():
#   mask(T, dev)        which of the L tokens each of the T new ones may attend to, True = may
#   with_tail(i, h, n)  the convolution's window of layer i: its last three inputs, then h
#   extend(i, k, v)     all keys and values of layer i, the new ones appended
#   advance(n)          n tokens have been added to each row


class Prefix:
    """The learner's past: grows by concatenation, so gradients flow back into the prompt.

    Fresh, it is empty, and takes the prompts (the trunk). `branch(rows)` then gives each row of a
    second pass the keys and values of its prompt: encoded once, attended to by every turn.
    """

    def __init__(self, config):
        self.k, self.v, self.tail = [None] * config.n_layer, [None] * config.n_layer, [None] * config.n_layer
        self.n = None  # (B,) tokens in each row of the past
        self.see = None  # (B, T, L) bool: who sees whom in the next pass; None: each token all before it

    def branch(self, rows, see=None):
        new = Prefix.__new__(Prefix)
        new.see = see
        new.k, new.v, new.tail = ([t[rows] for t in ts] for ts in (self.k, self.v, self.tail))
        new.n = self.n[rows]
        return new

    def mask(self, T, device):
        if self.see is not None:
            return self.see[:, None]  # (B, 1, T, L)
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()[None, None]  # (1, 1, T, T)
        if self.n is None:
            return causal
        P = self.k[0].size(2)
        real = torch.arange(P, device=device) < self.n[:, None]  # (B, P): the prompt without its padding
        B = len(self.n)
        return torch.cat([real[:, None, None].expand(B, 1, T, P), causal.expand(B, 1, T, T)], -1)  # (B, 1, T, P+T)

    def with_tail(self, i, h, n):
        wide = F.pad(h, (0, 0, WIDTH - 1, 0)) if self.tail[i] is None else torch.cat([self.tail[i], h], 1)  # (B, 3+T, C)
        self.tail[i] = last_inputs(wide, h.size(1) if n is None else n)
        return wide

    def extend(self, i, k, v):
        if self.k[i] is not None:
            k, v = torch.cat([self.k[i], k], 2), torch.cat([self.v[i], v], 2)
        self.k[i], self.v[i] = k, v
        return k, v  # (B, nh, P+T, hs)

    def advance(self, n):
        self.n = n if self.n is None else self.n + n


class Cache:
    """The sampler's past: preallocated buffers in which row b's tokens fill slots 0..n[b]-1, no gaps.

    A token's slot is its depth in its context. New tokens are written at slot n[b] and up; whatever
    lies there from before is overwritten, and cannot be seen until then. So forgetting is free:
    `rollback()` sets n back to the end of the prompt, whose keys and values stay valid for good.
    """

    def __init__(self, model, B):
        config, like = model.config, model.emb.weight  # its device and precision
        nh, C = config.n_head, config.n_embd
        shape = config.n_layer, B, nh, 0, C // nh  # reserve() makes room
        self.k, self.v = torch.zeros(2, *shape, device=like.device, dtype=torch.bfloat16 if model.half else like.dtype)
        self.tail = torch.zeros(config.n_layer, B, WIDTH - 1, C, device=like.device, dtype=like.dtype)
        self.n = torch.zeros(B, dtype=torch.long, device=like.device)  # (B,)
        self.B, self.used, self.most = B, 0, 0  # rows in use (the first B of them); slots in use (the first of each); no row holds more than this

    def keep_prompt(self):
        """Call when exactly the prompts are in: rollback() comes back to here."""
        self.prompt_n, self.prompt_tail = self.n.clone(), self.tail.clone()

    def rollback(self, rows):
        """Forget all but the prompt in the rows where `rows` (B,) is True."""
        B = self.B
        self.n[:B] = torch.where(rows, self.prompt_n[:B], self.n[:B])  # (B,)
        self.tail[:, :B] = torch.where(rows[:, None, None], self.prompt_tail[:, :B], self.tail[:, :B])  # (nl, B, 3, C)

    def reorder(self, order):
        """Rows in a new order: order (B',) holds the old places; rows beyond B' keep theirs."""
        n = len(order)
        for buffer in (self.k, self.v, self.tail, self.prompt_tail):
            buffer[:, :n] = buffer[:, order]
        for buffer in (self.n, self.prompt_n):
            buffer[:n] = buffer[order]

    def reserve(self, T):
        """Make room for T more tokens in every row, and for some beyond. Their positions (B, T).

        Once a turn, when several come at once, it waits for the device to learn how long the longest row is;
        while tokens come one by one it counts along.
        """
        if T > 1:
            self.most = int(self.n[: self.B].max())
        self.most, L = self.most + T, self.k.size(3)
        if self.most > L:
            grow = (0, 0, 0, -(-self.most // 32) * 32 - L)  # by no more: what MEM1 needs does not grow, so neither does this
            self.k, self.v = F.pad(self.k, grow), F.pad(self.v, grow)
        self.used = -(-self.most // 32) * 32  # a multiple of 32: few shapes
        self.slots = self.n[: self.B, None] + torch.arange(T, device=self.n.device)  # (B, T)
        return self.slots

    def nbytes(self):
        return 2 * self.k.numel() * self.k.element_size()

    def mask(self, T, device):
        return (torch.arange(self.used, device=device) <= self.slots[..., None])[:, None]  # (B, 1, T, L)

    def with_tail(self, i, h, n):
        wide = torch.cat([self.tail[i, : self.B], h], 1)  # (B, 3+T, C)
        self.tail[i, : self.B] = last_inputs(wide, h.size(1) if n is None else n)
        return wide

    def extend(self, i, k, v):
        B, rows = self.B, torch.arange(self.B, device=k.device)[:, None]  # (B, 1)
        for buffer, new in (self.k, k), (self.v, v):
            buffer[i, :B].transpose(1, 2)[rows, self.slots] = new.transpose(1, 2).to(buffer.dtype)  # (B, T, nh, hs)
        return self.k[i, :B, :, : self.used], self.v[i, :B, :, : self.used]  # each (B, nh, L, hs)

    def advance(self, n):
        self.n[: self.B] += n


def last_inputs(wide, n):
    """The three inputs before the next token: wide (B, 3+T, C) holds n (B,) or n real ones after the old three."""
    if isinstance(n, int):
        return wide[:, n : n + WIDTH - 1]
    at = n[:, None] + torch.arange(WIDTH - 1, device=wide.device)  # (B, 3)
    return wide.gather(1, at[..., None].expand(-1, -1, wide.size(2)))  # (B, 3, C)


# ----------------------------------------------------------------------------------------------
# Files

FORMAT = "mem1 checkpoint 1"  # another number as soon as what is in there changes


def write_atomically(path, *parts, previous=None):
    """Write bytes to a temporary file, see it on the disk, rename: a reader finds the old file or the new one, never half of one.

    previous: a path where the old one is to stay.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if previous and path.exists():
        os.replace(path, previous)
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)  # the new name, too
    os.close(directory)


def save(path, state, previous=None):
    """Tensors, numbers and texts into a file: a line of JSON with their SHA-256, then what torch.save makes of them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    head = dict(format=FORMAT, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_atomically(path, json.dumps(head).encode() + b"\n", data, previous=previous)


def restore(path):
    """What save() wrote. Anything else is a ValueError that says in one line what is wrong; no code in the file is ever run."""
    try:
        with open(path, "rb") as file:
            head, data = file.readline(1000), file.read()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    try:
        form, size, digest = (json.loads(head)[key] for key in ("format", "bytes", "sha256"))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is not a checkpoint: its first line is not one of `{FORMAT}`") from None
    if form != FORMAT:
        raise ValueError(f"{path} is a `{form}`, this version reads `{FORMAT}`")
    if len(data) != size:
        raise ValueError(f"{path} is cut off: {len(data)} bytes of {size}")
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in its first line")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler of a made-up file may raise anything
        raise ValueError(f"{path} holds more than tensors, numbers and texts ({type(error).__name__}): refused") from None


def fits(weights, config):
    """Whether these are the weights of a GPT of this config, by names, shapes and precision. Nothing is allocated."""
    if not isinstance(weights, dict) or len(weights) < config.n_layer:
        return False
    with torch.device("meta"):
        expected = GPT(config).state_dict()
    return (list(weights) == list(expected) and all(isinstance(w, torch.Tensor) for w in weights.values())
            and all((weights[name].shape, weights[name].dtype, weights[name].layout) == (w.shape, torch.float32, w.layout) for name, w in expected.items()))
