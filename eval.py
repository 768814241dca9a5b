"""eval.py: how well the agents of a run do, at what memory cost, up to horizons never trained on.

    python eval.py runs/cpu                  # the trend: 1, 2, 4, 8, 16 objectives
    python eval.py runs/cpu --show 2         # two episodes of each agent: pruned, read, written

Greedy decoding; a method named *-sampled samples at temperature 1, as PPO does. Test episodes come
from keys that no training and no validation episode has. A cell has at most 4096 questions, so at
32 objectives at most 128 episodes.

    em          objectives answered exactly, 0..N
    peak        most tokens in context over the turns, prompt not counted, as in the paper; averaged
                over all episodes (the paper's code averages over those with some success)
    dependency  tokens each written token looked back on, summed, prompt not counted (app. A.4)
    turns       exchanges with the environment
    malformed   share of episodes that end in a malformed turn, or one cut off at the length limit
    right       share of turns that are exactly what the demonstrator with oracle notes would write
    time        seconds per episode, many played side by side
"""
import argparse
import difflib
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch

import envs
import ppo
from envs import Stream, keyed_rng
from mem1 import ENC, IS, POLICIES, expert, keep_last, rollout
from model import GPT, GPTConfig

SEED = 1  # of validation and test episodes; those of seed 0 were seen while settings were chosen
CELL_QUESTIONS = 4096  # questions in a cell of the table

# What is in a checkpoint.
CHECKPOINT = "config commit stage step models model optimizer seconds log_bytes".split()

# --- Loading a run


def load_checkpoint(out):
    """The state in a run's checkpoint. ValueError in one line if it is missing or damaged."""
    path = Path(out) / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not verify checksums
            require(file.testzip() is None, "its checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        require(set(state) == set(CHECKPOINT), "unexpected contents")
    except Exception as error:  # unpickling a foreign file may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is not an intact checkpoint of this code: {reason}")
    return state


def require(condition, message):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def load_run(out):
    """(settings, models) of a run; adds its words to ENC. ValueError in one line."""
    state = load_checkpoint(out)
    cfg = SimpleNamespace(**state["config"])
    ENC.add(envs.world(cfg.env).extra_words)
    return cfg, state["models"]


def load_model(saved, device="cpu"):
    """A model of a checkpoint, {config, weights}."""
    model = GPT(GPTConfig(**saved["config"])).to(device)
    model.load_state_dict(saved["weights"])
    return model


# --- Many episodes


def play(model, policy, cfg, n_objectives, which, split, sampled=False):
    """The trajectories of some episodes of one horizon, greedy or sampled. which: their numbers."""
    keys = [[SEED, split, n_objectives, i, 0] for i in which]
    environments = [envs.world(cfg.env)(n_objectives, cfg.hops, key) for key in keys]
    rngs = [keyed_rng(SEED, split, n_objectives, i, 2) for i in which] if sampled else None
    return rollout(model, environments, policy, rngs, min(cfg.play_batch, 256))  # bounds the cache


def measure(model, policy, cfg, n_objectives, episodes, split, sampled=False):
    """Means over episodes split among the processes; the top of this file explains each."""
    stats = []
    for traj in play(model, policy, cfg, n_objectives, ppo.share(episodes), split, sampled):
        turns, env = traj.turns, traj.env
        right = [turn.written == expert(env, policy, turns[:t]) for t, turn in enumerate(turns)]
        stats.append(dict(
            em=env.em, peak=traj.peak, dependency=traj.dependency, turns=len(turns),
            malformed=int(env.cause == "malformed"), right=sum(right) / len(right),
            time=traj.seconds))
    return ppo.mean_of(stats)


def validate(model, agent, cfg):
    """EM at 2 and 16 objectives, or the most tested: {"em@2": ..., "em@16": ...}."""
    horizons = sorted({min(n, max(cfg.eval_objectives)) for n in (2, 16)})
    return {f"em@{n}": measure(model, POLICIES[agent], cfg, n, cfg.valid_episodes,
                               Stream.VALID)["em"] for n in horizons}


def methods(models):
    """The methods to test: all agents greedy; those with PPO also sampled, before it and after."""
    names = []
    for name in models:
        if name != "primer":
            names.append(name)
            if name.removesuffix("-demos") in models:
                names.append(f"{name}-sampled")
    return names


def load_method(models, name, device):
    """(model, policy, is it sampled?) of a method."""
    source = name.removesuffix("-sampled")
    policy = POLICIES[source.removesuffix("-demos")]
    return load_model(models[source], device), policy, source != name


def table(models, cfg, chosen, episodes, log):
    """{method: {objectives: measures}}; log(line) of each as it is known."""
    measured = "em peak dependency turns malformed right time".split()
    log(f"{'method':23s} {'N':>3s}" + "".join(f"{key:>11s}" for key in measured))
    results = {}
    for name in chosen:
        model, policy, sampled = load_method(models, name, cfg.device)
        results[name] = {}
        for n in cfg.eval_objectives:
            n_episodes = min(episodes, CELL_QUESTIONS // n)
            r = measure(model, policy, cfg, n, n_episodes, Stream.TEST, sampled)
            results[name][n] = r
            log(f"{name:23s} {n:3d}" + "".join(f"{r[key]:11.2f}" for key in measured))
    return results


def trend(results):
    """The paper's headline, at the farthest horizon up to 16: mem1 against full context, before PPO
    or after, whichever is better.

    >>> trend({"mem1": {2: dict(em=1.8, peak=50)}, "full-demos": {2: dict(em=0.9, peak=100)},
    ...        "full": {2: dict(em=0.6, peak=120), 32: dict(em=1.2, peak=900)}})[:91]
    'at 2 objectives mem1 answers 1.80, full context 0.90: 2.0 times the accuracy, with 1/2.0 of'
    """
    full = [results[name] for name in ("full-demos", "full") if name in results]
    n = max((n for cells in full for n in cells if n <= 16), default=None)
    if n is None or "mem1" not in results:
        return "no comparison: that needs mem1 and full, at 16 objectives or fewer"
    a = results["mem1"][n]
    b = max((cells[n] for cells in full), key=lambda cell: cell["em"])
    times = f": {a['em'] / b['em']:.1f} times the accuracy" if b["em"] else ""
    return (f"at {n} objectives mem1 answers {a['em']:.2f}, full context {b['em']:.2f}{times}, "
            f"with 1/{b['peak'] / a['peak']:.1f} of the peak tokens (paper: 3.5, 1/3.7)")


def show_change(models, cfg):
    """Print an episode of mem1 before PPO and after: the first that is not solved before."""
    played = {}
    for name in "mem1-demos", "mem1":
        model = load_model(models[name], cfg.device)
        played[name] = play(model, keep_last, cfg, cfg.objectives[1], range(16), Stream.VALID)
    first = next((e for e, traj in enumerate(played["mem1-demos"]) if traj.reward < 1), 0)
    for name, trajs in played.items():
        print(f"--- {name}")
        show(trajs[first])


def show(traj):
    """Print an episode turn by turn: `-` pruned since the last turn, `=` read, `+` written now."""
    print(f"task   {ENC.decode(traj.prompt)}")
    before = []
    for t, turn in enumerate(traj.turns):
        read = turn.context[len(traj.prompt) : -1]  # all but its <IS>
        pruned = []
        for op, a, b, _, _ in difflib.SequenceMatcher(None, before, read, False).get_opcodes():
            if op != "equal":
                pruned += before[a:b]
        print(f"turn {t + 1}")
        now = [IS, *turn.written]
        for mark, ids in ("-", pruned), ("=", read), ("+", now):
            if ids:
                print(f"     {mark} {ENC.decode(ids)}")
        before = read + now + turn.info
    env = traj.env
    golds = envs.entries(dict(env.golds))
    print(f"       {env.cause}; the right answer is {golds}: em {env.em}/{env.n_objectives}, "
          f"peak {traj.peak} tokens\n", flush=True)


# --- The command line


class Parser(argparse.ArgumentParser):
    """No abbreviated flags; errors in one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help explains the flags)\n")


def main(argv=None):
    """Evaluate one run."""
    parser = Parser(__doc__)
    parser.add_argument("run", help="directory of a run, such as runs/cpu")
    parser.add_argument("--agents", nargs="+", help="such as mem1 full-demos; default: all")
    parser.add_argument("--objectives", type=int, nargs="+", help="horizons; default: the run's")
    parser.add_argument("--episodes", type=int, help="episodes per cell; default: the run's")
    parser.add_argument("--env", help="play in this world, trained for or not; default: the run's")
    parser.add_argument("--show", type=int, metavar="K", help="print K episodes of each agent")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", default=devices[0], choices=devices)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        cfg, models, chosen = settings(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not args.show:
        print(trend(table(models, cfg, chosen, args.episodes or cfg.eval_episodes, print)))
        return
    for name in chosen:
        model, policy, sampled = load_method(models, name, cfg.device)
        for n in args.objectives or [4]:
            print(f"--- {name}, {n} objectives")
            for traj in play(model, policy, cfg, n, range(args.show), Stream.TEST, sampled):
                show(traj)


def settings(args):
    """The run's settings, its models, and the methods to evaluate. ValueError in one line."""
    cfg, models = load_run(args.run)
    cfg.device = args.device
    cfg.env = args.env or cfg.env
    longest = envs.longest_horizon(cfg)
    cfg.eval_objectives = args.objectives or [n for n in cfg.eval_objectives if n <= longest]
    names = methods(models)
    chosen = args.agents or names
    if args.show and not args.agents:
        chosen = [name for name in names if not name.endswith("-sampled")]
    require(names, f"{args.run} has no agent yet; resume it with train.py")
    fits = all(1 <= n <= longest for n in cfg.eval_objectives)
    require(fits, f"--objectives: expected 1 to {longest}")
    require(set(chosen) <= set(names), f"--agents: expected some of {' '.join(names)}")
    for number in args.episodes, args.show:
        require(number is None or number > 0, "--episodes, --show: expected 1 or more")
    return cfg, models, chosen


if __name__ == "__main__":
    for number in signal.SIGPIPE, signal.SIGINT:  # `| head` and Ctrl-C end it quietly
        signal.signal(number, signal.SIG_DFL)
    main()
