"""model.py: a small GPT with a value head, in raw PyTorch, and its key-value cache.

    B batch, T tokens, L tokens to look back on, C channels, nh heads, hs head size, V vocabulary

One forward pass serves sampler and learner, so they agree up to rounding:
    the learner   model(ids)          whole rows, right-padded, causal attention
    the sampler   model(ids, cache)   a few new tokens per row, after those in the cache

Differs from GPT-2, so that half a million weights can learn to look things up within minutes:
1) a causal convolution over queries and keys, which starts as an induction head (arXiv 2209.11895):
   a query finds what followed its last three words earlier. So copying and looking up need not
   emerge, only be refined;
2) forget gates (arXiv 2503.02130) instead of positions: a token's age is what the gates
   added since, so the latest state stands out at any length;
3) squared ReLU (arXiv 2109.08668); the embeddings (tied, as in GPT-2) are normed on the way in; no
   biases but those of the gates and the value head.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

WIDTH = 4  # of the convolution: a token and the three before it
torch.backends.cuda.enable_cudnn_sdp(False)  # it re-plans for every shape, and ours vary


@dataclass
class GPTConfig:
    """Model hyperparameters."""
    vocab_size: int
    n_layer: int = 4
    n_head: int = 2
    n_embd: int = 96
    bfloat16: bool = False  # matrix products; weights, softmax, logits, values stay float32


class GPT(nn.Module):
    """Decoder-only transformer. forward() gives hidden states; logits() and value() read them."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, C)
        self.ln_in = nn.LayerNorm(C, bias=False)
        self.ln_out = nn.LayerNorm(C, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.value_head = nn.Linear(C, 1)
        # Tied embeddings: a token's logit on its own embedding starts at sqrt(C).
        nn.init.normal_(self.emb.weight, std=C**-0.5)
        # V = 0 at first, so that advantages start as plain returns.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, ids, cache=None):
        """Hidden states (B, T, C) of tokens `ids` (B, T).

        cache  what each row looks back on; Cache.reserve() has made room for the new tokens. None:
               each row by itself, under a causal mask
        """
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.config.bfloat16):
            x = self.ln_in(self.emb(ids))  # (B, T, C)
            for layer, block in enumerate(self.blocks):
                x = block(x, cache, layer)  # (B, T, C)
            return self.ln_out(x)  # (B, T, C)

    def logits(self, x):
        """(..., C) -> (..., V). The row at t predicts ids[t+1]."""
        return F.linear(x, self.emb.weight)

    def value(self, x):
        """(..., C) -> (...): what the rest of the episode is expected to earn. Scaled down, since
        Adam moves each of C weights by about lr, however noisy the returns."""
        return self.value_head(x).squeeze(-1) * x.size(-1) ** -0.5


class Block(nn.Module):
    """x + attention(norm(x)), with a convolution over q and k, and gates; then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(C, bias=False)
        self.ln_2 = nn.LayerNorm(C, bias=False)
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        self.up = nn.Linear(C, 4 * C, bias=False)
        self.down = nn.Linear(4 * C, C, bias=False)
        for linear, gain in (self.qkv, 1.0), (self.proj, 0.3), (self.up, 1.0), (self.down, 0.3):
            nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
        # A head start for lookup (after arXiv 2305.09828): queries match similar keys, and what is
        # read is passed on roughly unchanged. (proj's draw above only keeps the random stream.)
        q, k, v = self.qkv.weight.data.chunk(3)  # each (C, C)
        k.copy_(q)
        self.proj.weight.data.copy_(0.3 * v.T)
        # A query is made of the last three words, a key of the three before its own, so in "a b c
        # ... a b" the last b finds c. Earlier words count less, except in the last head.
        fade = torch.linspace(0.5, 1, self.n_head).repeat_interleave(C // self.n_head)  # (C,)
        three = torch.stack([fade**2, fade, torch.ones_like(fade)])  # (3, C)
        taps = F.pad(three, (0, 0, 1, 0)), F.pad(three, (0, 0, 0, 1))  # of q and k (WIDTH, C)
        self.taps = nn.Parameter(torch.cat(taps, dim=1))  # (WIDTH, 2C)
        # At first a token adds 1/55 (first head) to 1/22000 (last) to the age of all before it.
        self.gate = nn.Linear(C, self.n_head)
        nn.init.zeros_(self.gate.weight)
        self.gate.bias.data = torch.linspace(4, 10, self.n_head)

    def forward(self, x, cache, layer):
        T, C = x.shape[1:]
        normed = self.ln_1(x)  # (B, T, C)
        h, v = self.qkv(normed).split((2 * C, C), dim=2)  # (B, T, 2C), (B, T, C)
        clock = -F.logsigmoid(self.gate(normed)).cumsum(1, dtype=x.dtype)  # (B, T, nh)
        if cache is None:
            wide = F.pad(h, (0, 0, WIDTH - 1, 0))  # (B, 3+T, 2C)
        else:
            wide, clock = cache.extend(layer, h, clock)  # (B, 3+T, 2C), (B, T, nh)
        qk = wide[:, :T] * self.taps[0]  # (B, T, 2C)
        for j in range(1, WIDTH):
            qk = torch.addcmul(qk, wide[:, j : j + T], self.taps[j])  # (B, T, 2C)

        q, k = qk.unflatten(2, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        v = v.unflatten(2, (self.n_head, -1)).transpose(1, 2)  # (B, nh, T, hs)
        q, k = with_age(q, k, clock)
        attn_mask = None  # which keys a token may attend to; None: its own and those before it
        if cache is not None:
            k, v, attn_mask = cache.append(layer, k, v)  # (B, nh, L, hs) twice, (B, 1, T, L)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=attn_mask is None)
        x = x + self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)
        y = F.relu(self.up(self.ln_2(x)))  # (B, T, 4C)
        return x + self.down(y * y)  # (B, T, C); y ** 2 would be float32 under autocast on CUDA


def with_age(q, k, clock):
    """Lower each score by the age of the key: q, k (B, nh, T, hs), clock (B, T, nh).

    A key is older by what the gates added to the clock since. Its score is q.k/sqrt(hs) + clock of
    the key - clock of the query; softmax is shift-invariant, so the last term drops out. The rest
    takes the place of the last two channels: the constant sqrt(hs) in the query, the clock in the
    key, as a sum of two numbers, since bfloat16 has 8 significant bits. Attention adds up the
    products in float32, for sampler and learner alike.
    """
    clock = clock.transpose(1, 2)  # (B, nh, T)
    coarse = clock.to(torch.bfloat16).to(clock.dtype)  # (B, nh, T)
    clock = torch.stack([coarse, clock - coarse], -1)  # (B, nh, T, 2)
    q = torch.cat([q[..., :-2], torch.full_like(clock, q.size(-1) ** 0.5)], -1)
    return q, torch.cat([k[..., :-2], clock], -1)  # each (B, nh, T, hs)


# --- The sampler's memory


class Cache:
    """Keys and values of B contexts in a buffer that grows: row b's tokens fill slots 0..n[b]-1.

    New tokens are written at slot n[b] and up; whatever lies there from before is overwritten, and
    cannot be seen until then. So forgetting costs nothing: rollback() sets n back to the end of the
    prompt, whose keys and values stay valid for the whole episode.
    """

    def __init__(self, model, B):
        config = model.config
        weight = model.emb.weight
        nh, C = config.n_head, config.n_embd
        dtype = torch.bfloat16 if config.bfloat16 else weight.dtype
        shape = config.n_layer, B, 2, nh, 0, C // nh  # keys, values; reserve() makes room
        self.kv = weight.new_zeros(shape, dtype=dtype)
        # Of the last three tokens: inputs of the convolution (2C) and clocks (nh), in each layer.
        self.tail = weight.new_zeros(config.n_layer, B, WIDTH - 1, 2 * C + nh)
        self.n = weight.new_zeros(B, dtype=torch.long)  # (B,)
        self.B = B  # the first rows: episodes that still write in this turn
        self.rows = B  # the first rows: all episodes that have not ended
        self.longest = 0  # upper bound on the row lengths

    def keep_prompt(self):
        """Call when exactly the prompts are in: rollback() comes back to here."""
        self.prompt_n = self.n.clone()  # (B,)
        self.prompt_tail = self.tail.clone()  # (n_layer, B, 3, 2C+nh)

    def rollback(self, rows):
        """Forget all but the prompt in some rows, a list of their numbers."""
        # Indexing with the list itself would copy it to a GPU four times.
        rows = torch.tensor(rows, dtype=torch.long, device=self.n.device)
        self.n[rows] = self.prompt_n[rows]
        self.tail[:, rows] = self.prompt_tail[:, rows]

    def compact(self, stay):
        """Continue with only the rows where `stay` (B,) is True, moved to the front.

        Returns `order` (B,): row b now holds what row order[b] held, including the rows that left.
        """
        order = torch.argsort(~stay, stable=True)  # (B,)
        for buffer in self.kv, self.tail, self.prompt_tail:
            buffer[:, : len(order)] = buffer[:, order]
        for buffer in self.n, self.prompt_n:
            buffer[: len(order)] = buffer[order]
        self.B = int(stay.sum())
        return order

    def reserve(self, T, real):
        """Make room for T more tokens in every row.

        Of these, the first real[b] of row b are tokens; no token sees the padding after them. With
        T > 1, once per turn, this syncs with the device to get the longest row; with T = 1, once
        per token, it adds one to the previous maximum: an upper bound.
        """
        B, device = self.B, self.n.device
        if T > 1:
            self.longest = int(self.n[:B].max())
            self.rows = B  # the rest belong to finished episodes
        self.longest += T
        self.L = -(-self.longest // 16) * 16  # slots in use: a multiple of 16, for few shapes
        have = self.kv.size(4)
        if self.L > have:
            room = max(self.L, have + have // 128 * 16)  # by an eighth, if that is more
            self.kv = F.pad(self.kv[:, : self.rows], (0, 0, 0, room - have))
        self.row = torch.arange(B, device=device)[:, None]  # (B, 1)
        self.slots = self.n[:B, None] + torch.arange(T, device=device)  # (B, T), of the new tokens
        every_slot = torch.arange(self.L, device=device)  # (L,)
        self.attn_mask = every_slot <= self.slots[:, None, :, None]  # (B, 1, T, L)
        # Of the three inputs before and the T new ones, the last three real ones: (B, 3).
        self.last = real[:, None] + torch.arange(WIDTH - 1, device=device)
        self.n[:B] += real

    def extend(self, layer, h, clock):
        """Prepend the three inputs before h (B, T, 2C): (B, 3+T, 2C). Continue clock (B, T, nh),
        which began at 0, from where the last one stopped."""
        tail, C2 = self.tail[layer, : self.B], h.size(2)
        clock = clock + tail[:, -1:, C2:]  # (B, T, nh)
        wide = torch.cat([tail, torch.cat([h, clock], 2)], 1)  # (B, 3+T, 2C+nh)
        self.tail[layer, : self.B] = wide[self.row, self.last]  # (B, 3, 2C+nh)
        return wide[..., :C2], clock

    def append(self, layer, k, v):
        """Write k, v (B, nh, T, hs) of a layer. Returns what is to be attended to: all keys, all
        values (B, nh, L, hs), and which of them each new token sees (B, 1, T, L)."""
        kv = self.kv[layer, : self.B]  # (B, 2, nh, slots, hs)
        new = torch.stack([k, v], 1).to(kv.dtype)  # (B, 2, nh, T, hs)
        kv.transpose(1, 3)[self.row, self.slots] = new.transpose(1, 3)  # (B, T, nh, 2, hs)
        return *kv[..., : self.L, :].unbind(1), self.attn_mask
