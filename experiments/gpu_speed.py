"""gpu_speed.py: how fast a GPU samples and learns, and what it waits for.

    python experiments/gpu_speed.py                         # all parts
    python experiments/gpu_speed.py --device cpu --quick    # at the smallest size: does it run?

    sizes      tokens a second of sampling and learning in bfloat16, for models of 0.5M, 25M and
               86M weights and 64 to 4096 episodes side by side; the learner's MFU, against the
               measured peak of a matmul
    decoding   one token in every row (one row: all of it is launching kernels); the time to read
               weights and cache alone; the same step replayed as a CUDA graph
"""
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from experiments.gpu import SIZES, TURNS, WRITTEN, Endless, main, metronomes
from mem1 import ENC, make_rows, merged_turns, predict, rollout
from model import GPT, Cache, GPTConfig


def least_seconds(work, device, times=5):
    """The least of several timings, after a warm-up."""
    took = []
    for _ in range(times + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return min(took[1:])


def flops(model, trajs):
    """Floating point operations of one pass over the rows, forward and backward, padding not
    counted (6 N + attention)."""
    C, nl = model.config.n_embd, model.config.n_layer
    lengths = [len(ids) for traj in trajs for ids, _ in merged_turns(traj)]
    forward = 2 * sum(p.numel() for p in model.blocks.parameters()) * sum(lengths)
    forward += 4 * nl * C * sum(n * (n + 1) // 2 for n in lengths)
    forward += 2 * C * model.config.vocab_size * sum(traj.n_trained for traj in trajs)
    return 3 * forward


def new_model(size, device, kind=GPT):
    layers, heads, channels = SIZES[size]
    return kind(GPTConfig(ENC.n_vocab, layers, heads, channels, bfloat16=True)).to(device)


def peaks(args):
    """(FLOP/s of a bfloat16 matmul, bytes a second of a copy)."""
    n, m = (512, 2**22) if args.quick else (8192, 2**28)
    a, b = torch.randn(2, n, n, device=args.device, dtype=torch.bfloat16)
    c = torch.randn(m, device=args.device)
    return (2 * n**3 / least_seconds(lambda: a @ b, args.device),
            2 * 4 * m / least_seconds(c.clone, args.device))


def sizes(args):
    product, copy = peaks(args)
    found = {"peak": f"{product / 1e12:.2f} TFLOP/s in a matmul, {copy / 1e12:.2f} TB/s in a copy"}
    for size in ["0.5M"] if args.quick else SIZES:
        for episodes in [4] if args.quick else [64, 256, 1024, 4096]:
            model = new_model(size, args.device, Endless)
            try:
                found[f"{size}, {episodes} episodes"] = one_size(model, episodes, args, product)
            except torch.OutOfMemoryError:
                found[f"{size}, {episodes} episodes"] = "too large for the memory of this GPU"
    return found


def one_size(model, episodes, args, product):
    def act():
        trajs[:] = rollout(model, *metronomes(episodes), episodes)

    def learn():
        for rows in batch:
            logp, value, _ = predict(model, rows.to(args.device))  # (m,), (m,)
            (logp.sum() + value.sum()).backward()
        model.zero_grad()

    trajs = []
    acting = least_seconds(act, args.device, times=1)
    batch = make_rows(trajs, 65536)
    learning = least_seconds(learn, args.device, times=2)
    tokens = sum(len(ids) for traj in trajs for ids, _ in merged_turns(traj))
    share = flops(model, trajs) / learning / product
    return (f"sampling {episodes * TURNS * WRITTEN / acting:,.0f} tokens/s, learner "
            f"{tokens / learning:,.0f} tokens/s, MFU {share:.0%}")


@torch.no_grad()
def decoding(args):
    _, copy = peaks(args)
    size = "0.5M" if args.quick else "25M"
    model, found = new_model(size, args.device), {}
    for B in [4] if args.quick else [1, 64, 1024]:
        cache = Cache(model, B)
        n = torch.full((B,), 128, device=args.device)
        ids = torch.ones(B, 128, device=args.device, dtype=torch.long)
        cache.reserve(128, n)
        model(ids, cache)
        cache.reserve(1, n.clamp(max=1))

        def step():
            return model.logits(model(ids[:, :1], cache)[:, 0]).argmax(-1)

        took = least_seconds(step, args.device, times=20)
        read = 4 * sum(p.numel() for p in model.parameters())
        read += cache.kv[..., : cache.L, :].nbytes
        text = f"{took * 1e3:.2f} ms, memory alone {read / copy * 1e3:.2f} ms"
        if args.device == "cuda":
            text += f", as a CUDA graph {seconds_of_graph(step) * 1e3:.2f} ms"
        found[f"{size}, {B} rows"] = text
    return found


def seconds_of_graph(step):
    """Seconds that it takes to replay a step; nan if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(f"no CUDA graph: {error}")
        return math.nan
    return least_seconds(graph.replay, "cuda", times=20)


if __name__ == "__main__":
    main(dict(sizes=sizes, decoding=decoding))
