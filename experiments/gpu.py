"""gpu.py: does a GPU compute what the CPU does? Any run on a GPU relies on this.

    python experiments/gpu.py
    python experiments/gpu.py --device cpu --quick    # at the smallest size: does it run?

Sampler and learner on the GPU, and a float64 learner on the CPU, score the same episodes. Printed
are the largest difference in log-probability, in nats, and the share of ratios outside 0.8 to 1.2.
How fast a GPU is: gpu_speed.py. Does it learn? python train.py --device cuda, with --dtype float32
and without.
"""
import argparse
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from mem1 import END, ENC, POLICIES, keep_last, make_rows, predict, rollout, turn_cap
from model import GPT, GPTConfig

SIZES = {"0.5M": (4, 2, 96), "25M": (8, 8, 512), "86M": (12, 12, 768)}  # layers, heads, channels
GIVEN, WRITTEN, TURNS = 24, 24, 6  # tokens read and written in a turn of a Metronome; its turns


class Metronome:
    """An environment that takes any text and replies with 24 tokens: all lengths are fixed."""
    done = False

    def __init__(self):
        self.left, self.history = TURNS, []
        self.prompt = " jelo" * 63
        self.n_questions = 0
        assert turn_cap(self) == WRITTEN, "nothing but the cap may end a turn"

    def step(self, kind, text):
        self.left -= 1
        self.done = self.left == 0
        return " jelo" * (GIVEN - 1)


class Endless(GPT):
    """A model that never ends a turn, so that all turns are as long as they may be."""

    def logits(self, x):
        logits = super().logits(x)  # (..., V)
        logits[..., END] = -1e9
        return logits


def metronomes(episodes):
    """The arguments of rollout() for that many Metronome episodes."""
    rngs = [np.random.default_rng(i) for i in range(episodes)]
    return [Metronome() for _ in range(episodes)], keep_last, rngs


def random_agent(size, device):
    """A model of random weights that writes as much as it may in every turn."""
    layers, heads, channels = SIZES[size]
    torch.manual_seed(0)
    model = Endless(GPTConfig(ENC.n_vocab, layers, heads, channels))
    for p in model.parameters():
        p.data += 0.03 * torch.randn_like(p)  # far from its initial structure
    return model.to(device)


# --- The parts: each returns {label: result}


def exact(args):
    found = {}
    for size in ["0.5M"] if args.quick else ["0.5M", "25M"]:
        for policy in "mem1", "full":
            for precision in "float64", "float32", "tf32", "bfloat16":
                torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
                model = random_agent(size, args.device)
                model.config.bfloat16 = precision == "bfloat16"
                if precision == "float64":
                    model.double()
                worlds, _, rngs = metronomes(2 if args.quick else 8)
                trajs = rollout(model, worlds, POLICIES[policy], rngs)
                sampled = [x for traj in trajs for turn in traj.turns for x in turn.logp]
                sampled = torch.tensor(sampled, dtype=torch.float64)
                log_ratio = learner_logp(model, trajs) - sampled
                on_cpu = learner_logp(random_agent(size, "cpu").double(), trajs)
                found[f"{size} {policy} {precision}"] = (
                    f"sampler to learner {log_ratio.abs().max():.1e}, "
                    f"to the CPU {(on_cpu - sampled).abs().max():.1e}, "
                    f"outside the clip {(log_ratio.expm1().abs() > 0.2).double().mean():.2%}")
    return found


@torch.no_grad()
def learner_logp(model, trajs):
    """logp (M,) of all trained tokens, float64, on the CPU."""
    batch = make_rows(trajs)
    device = model.emb.weight.device
    order = torch.cat([rows.place for rows in batch]).argsort()
    return torch.cat([predict(model, rows.to(device))[0].double().cpu() for rows in batch])[order]


def main(parts):
    """Run the chosen parts, then print all that they found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", help=f"default: all of {' '.join(parts)}")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="smallest sizes")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; try --device cpu --quick")
    unknown = set(args.parts) - set(parts)
    if unknown:
        parser.error(f"{' '.join(unknown)}: expected some of {' '.join(parts)}")
    torch.set_num_threads(1)
    print(torch.cuda.get_device_name() if args.device == "cuda" else "CPU")
    failed = False
    for name in args.parts or parts:
        started = time.perf_counter()
        try:
            found = parts[name](args)
        except Exception:  # whatever it was, the other parts are worth having
            found, failed = {"FAILED": traceback.format_exc()}, True
        lines = [f"    {key}: {value}" for key, value in found.items()]
        print(f"{name} ({time.perf_counter() - started:.0f} s)", *lines, sep="\n", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main(dict(exact=exact))
