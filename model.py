"""model.py: a small GPT with a value head, in raw PyTorch, and the two kinds of past it can look back on.

    B batch, T new tokens, L tokens to look back on (new ones included), C channels, nh heads, hs head
    size, V vocabulary

One `forward` serves both sides of reinforcement learning, so that they cannot disagree:
    the sampler   looks back on a `Cache`: static buffers, written in place, rolled back to the prompt
    the learner   looks back on a `Tree`: many contexts at once, what they share held once, no padding
At the end: how a model is kept in a file, such that no crash, no full disk and no flipped bit goes unseen.

Differs from GPT-2, each because half a million weights have to learn to look things up in minutes:
1) a causal convolution of width 4 before q, k, v (a "Canon layer", arXiv 2512.17351): a token sees
   the three before it without spending a head on that. It is what makes lookup quick to learn;
2) rotary positions (arXiv 2104.09864) on part of each head; no learned positions, no biases but the value head's;
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
        self.rope = self.hs // 3 * 2  # channels of a head that carry the position: two thirds, always even
        self.emb = nn.Embedding(config.vocab_size, C)
        self.ln_in, self.ln_out = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.value_head = nn.Linear(C, 1)
        nn.init.normal_(self.emb.weight, std=C**-0.5)  # tied: a token's logit on its own embedding starts at sqrt(C)
        nn.init.zeros_(self.value_head.weight)  # V = 0 at first: advantages start as plain returns
        nn.init.zeros_(self.value_head.bias)

    def forward(self, ids, pos, past):
        """Hidden states (B, T, C) of new tokens `ids` (B, T) at positions `pos` (B, T) after `past`."""
        with torch.autocast(ids.device.type, torch.bfloat16) if self.half else contextlib.nullcontext():
            x = self.ln_in(self.emb(ids))  # (B, T, C)
            angle = pos[..., None] * self._frequencies(x)  # (B, T, rope/2)
            rotation = angle.cos()[:, :, None, None], angle.sin()[:, :, None, None]  # each (B, T, 1, 1, rope/2)
            for i, block in enumerate(self.blocks):
                x = block(x, rotation, past, i)  # (B, T, C)
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
    """x + attention(h + conv(h)) where h is norm(x), then x + mlp(norm(x))."""

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

    def forward(self, x, rotation, past, i):
        h = self.ln_1(x)
        q, k, v = self.heads(h, past.before(i, h), rotation)  # each (B, T, nh, hs)
        return self.output(x, past.attend(i, q, k, v))  # (B, T, C)

    def heads(self, h, before, rotation):
        mixed = h
        for x, tap in zip([*before, h], self.taps, strict=True):
            mixed = torch.addcmul(mixed, x, tap)  # (B, T, C): mixed + x tap, in one pass over memory
        qk, v = self.qkv(mixed).unflatten(-1, (3, self.n_head, -1)).split([2, 1], 2)  # (B, T, 2, nh, hs), (B, T, 1, nh, hs)
        return *rotate(qk, rotation).unbind(2), v.squeeze(2)

    def output(self, x, y):
        x = x + self.proj(y)  # (B, T, C)
        return x + self.down(F.relu(self.up(self.ln_2(x))).square())

    def compile(self):
        """Fuse what has no side effects; the past is left out."""
        self.heads, self.output = torch.compile(self.heads, dynamic=True), torch.compile(self.output, dynamic=True)


def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(hs) + bias) v. q (B, nh, T, hs), k and v (B, nh, L, hs), bias (B or 1, 1, T, L) -> (B, T, C)."""
    att = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1) + bias  # (B, nh, T, L)
    return (att.softmax(-1) @ v).transpose(1, 2).flatten(2)  # (B, T, C)


def as_bias(see):
    """What may be seen (B, T, L), bool, as a bias (B, 1, T, L): 0 there, elsewhere so low that nothing comes through."""
    return see.logical_not()[:, None] * -1e9


def rotate(x, rotation):
    """Rotary position embedding of the first channels of x (B, T, 2, nh, hs); the rest sees no position."""
    cos, sin = rotation  # each (B, T, 1, 1, r)
    r = cos.size(-1)
    a, b, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)  # (B, T, 2, nh, hs)


# ----------------------------------------------------------------------------------------------
# What the new tokens may look back on. Both kinds answer the same two calls of forward():
#   before(i, h)        what the convolution of layer i reads: of each token, h of the three before it, each (B, T, C)
#   attend(i, q, k, v)  what the heads of layer i read (B, T, C)


class Tree:
    """The learner's past: all tokens of a mem1.Pack as one row (1, N), of which each has its own past among the others.

    Everything but attention is done on the tokens as they lie there: a prompt that many turns share is there
    once, and nothing is padded. For attention the contexts are laid out as rectangles, those of like length together.
    """

    def __init__(self, pack):
        self.pack, self.biases = pack, [as_bias(see) for _, _, see in pack.rectangles]  # each (R, 1, S, L)

    def before(self, i, h):
        rows = F.pad(h[0], (0, 0, 1, 0))  # (1 + N, C), the first stands for nothing
        return [gather(rows, places)[None] for places in self.pack.before]  # each (1, N, C)

    def attend(self, i, q, k, v):
        q, kv = q[0].flatten(1), torch.cat([k[0], v[0]], 1).flatten(1)  # (N, C), (N, 2C)
        read = []
        for (queries, keys, _), bias in zip(self.pack.rectangles, self.biases):  # (R, S), (R, L)
            key, value = gather(kv, keys).unflatten(-1, (2, k.size(2), -1)).permute(2, 0, 3, 1, 4)  # each (R, nh, L, hs)
            query = gather(q, queries).unflatten(-1, (k.size(2), -1)).transpose(1, 2)  # (R, nh, S, hs)
            read.append(attend(query, key, value, bias).flatten(0, 1))  # (R * S, C)
        return gather(torch.cat(read), self.pack.place)[None]  # (1, N, C)


def gather(rows, index):
    """rows[index]: (N, C), any shape -> (..., C). index_select(), since its backward pass is the faster one."""
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape)


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
        self.B, self.rows, self.bytes = B, B, 0  # rows in use (the first B of them); rows that may come into use again; allocated at most
        self.used, self.most = 0, 0  # slots in use (the first of each row); no row holds more than this

    def keep_prompt(self):
        """Call when exactly the prompts are in: rollback() comes back to here."""
        self.prompt_n, self.prompt_tail = self.n.clone(), self.tail.clone()

    def rollback(self, rows):
        """Forget all but the prompt in the rows where `rows` (B,) is True."""
        B = self.B
        self.n[:B] = torch.where(rows, self.prompt_n[:B], self.n[:B])  # (B,)
        self.tail[:, :B] = torch.where(rows[:, None, None], self.prompt_tail[:, :B], self.tail[:, :B])  # (nl, B, 3, C)

    def keep(self, stays):
        """Go on with the rows where `stays` [bool, ...] is True: each row that leaves from among the first changes places with one that
        stays from behind them.

        Returns `order`: order[b] is the old place of what is in row b now, those that left included.
        """
        n, order = sum(stays), list(range(len(stays)))
        free, moving = [b for b in order[:n] if not stays[b]], [b for b in order[n:] if stays[b]]
        for a, b in zip(free, moving):
            order[a], order[b] = b, a
        here, there = torch.tensor([free + moving, moving + free], dtype=torch.long, device=self.n.device)
        for buffer in (self.k[..., : self.used, :], self.v[..., : self.used, :], self.tail, self.prompt_tail):
            buffer[:, here] = buffer[:, there]
        for buffer in (self.n, self.prompt_n):
            buffer[here] = buffer[there]
        self.B = n
        return order

    def reserve(self, T, n):
        """Make room for T more tokens in every row, and return their positions (B, T).

        Only the first n[b] of row b are real; the padding stands behind them, where no real token sees it. With T > 1,
        once a turn, this waits for the device to learn how long the longest row is. With T = 1 it adds one to that: a bound.
        """
        if T > 1:
            self.most, self.rows = int(self.n[: self.B].max()), self.B
        self.most, L = self.most + T, self.k.size(3)
        self.used = -(-self.most // 16) * 16  # a multiple of 16: few shapes
        if self.used > L:
            grow = 0, 0, 0, max(self.used, L + L // 128 * 16) - L  # or by an eighth, if that is more: seldom copied, and at most an eighth is spare
            self.k, self.v = F.pad(self.k[:, : self.rows], grow), F.pad(self.v[:, : self.rows], grow)
            self.bytes = max(self.bytes, 2 * self.k.numel() * self.k.element_size())
        slots = self.n[: self.B, None] + torch.arange(T, device=self.n.device)  # (B, T)
        self.bias = as_bias(torch.arange(self.used, device=self.n.device) <= slots[..., None])  # (B, 1, T, L)
        self.at = torch.arange(self.B, device=self.n.device)[:, None], slots  # (B, 1), (B, T): where the new ones go
        self.last = n[:, None] + torch.arange(WIDTH - 1, device=self.n.device)  # (B, 3): of the three before and the T new, the last real ones
        self.n[: self.B] += n
        return slots

    def before(self, i, h):
        T, wide = h.size(1), torch.cat([self.tail[i, : self.B], h], 1)  # (B, 3+T, C)
        self.tail[i, : self.B] = wide.gather(1, self.last[..., None].expand(-1, -1, wide.size(2)))  # (B, 3, C)
        return [wide[:, j : j + T] for j in range(WIDTH - 1)]

    def attend(self, i, q, k, v):
        for buffer, new in (self.k, k), (self.v, v):
            buffer[i, : self.B].transpose(1, 2)[self.at] = new.to(buffer.dtype)  # (B, T, nh, hs)
        return attend(q.transpose(1, 2), self.k[i, : self.B, :, : self.used], self.v[i, : self.B, :, : self.used], self.bias)


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
