"""ppo.py: proximal policy optimisation on exactly the tokens that the agent chose.

Begin with update(): one iteration, from the rollout to the optimizer steps. The tokens that the
agent chose are in flat tensors, episode after episode. In GAE the next step is the next token
sampled, maybe a turn later: credit crosses what was read in between (MEM1 sec. 3.3, app. A.5).

    M trained tokens, m of them in the rows at hand, J turns
    old_logp, old_value, ref_logp, adv, ret: (M,);  logp, value, entropy of the learner: (m,)

Losses are sums over trained tokens, divided by their count over all processes and micro-batches of
the optimizer step, so the gradient does not depend on how the batch is split.

Differs from the paper's released code:
1) GAE, whitening and the critic's loss skip what was only read; there, they include retrieved text;
2) old log-probabilities are the sampler's own, and `gap` logs how far the learner is from them;
   there, they are recomputed under the stitched layout;
3) the KL to the reference (coefficient 0.01; there 0.001) is not clamped at 0, which would bias it;
4) the critic is a head on the actor's network whose gradient stops at that head (but counts in the
   norm that is clipped), and its loss is not clipped; there, it is a second network with 10 times
   the learning rate and a clipped loss;
5) the reward is the share of right answers, 0..1; there, their number, 0..N;
6) two epochs over each batch; there, one. No entropy bonus; there, 0.001. Sampled at temperature 1
   from the whole distribution; there, from its top 95%;
7) every minibatch has a few reading exercises beside it, since our model is not pretrained.
"""
import contextlib

import numpy as np
import torch
import torch.distributed as dist

from envs import Stream, keyed_rng
from mem1 import exercise, keep_all, make_rows, memory_recall, predict, rollout, visible_context


def update(model, optimizer, reference, environments, policy, cfg, step):
    """One PPO iteration on this process's `environments`, under a context policy. Returns what to
    log. reference: the imitated model, frozen."""
    raw = getattr(model, "module", model)  # without its DDP wrapper
    weight = raw.emb.weight  # the tensors made below have its dtype and device
    device = weight.device

    # 1. Rollout.
    mine = share(cfg.ppo_batch)
    rngs = [keyed_rng(cfg.seed, Stream.PPO, step, e, 2) for e in mine]
    trajs = rollout(raw, environments, policy, rngs, cfg.play_batch)

    # 2. Compute the advantage of each token that the agent chose.
    turns = [turn for traj in trajs for turn in traj.turns]
    old_logp = weight.new_tensor([x for turn in turns for x in turn.logp])  # (M,)
    old_value = weight.new_tensor([x for turn in turns for x in turn.value])  # (M,)
    ref_logp = torch.zeros_like(old_logp)  # (M,)
    with torch.no_grad():
        for rows in make_rows(trajs, cfg.micro_batch):
            rows = rows.to(device)
            ref_logp[rows.place] = predict(reference, rows)[0]
    earned = weight.new_tensor([r for traj in trajs for r in turn_rewards(traj)])  # (J,)
    turn_ends = segment_ends([len(turn.written) for turn in turns], device)  # (M,)
    episode_ends = segment_ends([traj.n_trained for traj in trajs], device)  # (M,)
    rewards = token_rewards(earned, turn_ends, old_logp, ref_logp, cfg.kl_coef)  # (M,)
    adv, ret = gae(rewards, old_value, episode_ends, cfg.gamma, cfg.lam)  # each (M,)
    adv = whiten(adv)  # (M,)

    # 3. Learn.
    gap = weight.new_zeros(())
    sums = weight.new_zeros(5)  # over all epochs: tokens, KL, KL to the reference, clipped, entropy
    for epoch in range(cfg.ppo_epochs):
        for k, chosen in enumerate(minibatches(cfg, step, epoch)):
            which = [mine.index(e) for e in chosen if e in mine]
            batch = make_rows(trajs, cfg.micro_batch, which)
            reading = []
            if cfg.exercises:  # or reading skills erode
                number = cfg.demos_steps + (step * cfg.ppo_epochs + epoch) * cfg.ppo_minibatches + k
                reading = make_rows(exercises(cfg, number), cfg.micro_batch)
            n_tokens, n_reading = token_count(batch, device), token_count(reading, device)
            final = (reading or batch)[-1]
            optimizer.zero_grad()
            for rows in batch:
                with no_sync(model, unless=rows is final):
                    rows = rows.to(device)
                    i = rows.place  # (m,)
                    old = old_logp[i]  # (m,)
                    logp, value, entropy = predict(model, rows)  # each (m,)
                    policy_term = policy_loss(logp, old, adv[i], cfg.clip)  # (m,)
                    value_term = 0.5 * (value - ret[i]) ** 2  # (m,); no gradient beyond the head
                    backward((policy_term + value_term).sum() / n_tokens)
                log_ratio, entropy = (logp - old).detach(), entropy.detach()  # each (m,)
                if epoch == 0 and k == 0:  # nothing is updated yet: learner and sampler must agree
                    gap = torch.cat([log_ratio.abs(), gap[None]]).max()  # m may be 0
                kl = approx_kl(log_ratio)  # (m,)
                to_ref = old - ref_logp[i]  # (m,)
                clipped = (log_ratio.expm1().abs() > cfg.clip).to(kl)  # (m,)
                sums += torch.stack([torch.ones_like(kl), kl, to_ref, clipped, entropy]).sum(1)

            for rows in reading:
                with no_sync(model, unless=rows is final):
                    backward(cfg.primer_coef * nll(model, rows.to(device)) / n_reading)

            norm = clip_and_step(model, optimizer, cfg.grad_clip)

    tokens, *totals = all_reduce(sums).tolist()
    means = {name: x / tokens for name, x in zip(("kl", "ref", "clip", "ent"), totals)}
    return dict(
        mean_over_episodes(trajs), tokens=tokens, norm=norm, **means,  # norm: the last minibatch's
        ev=explained_variance(old_value, ret), gap=all_reduce(gap, dist.ReduceOp.MAX).item())


def nll(model, rows):
    """Negative log-likelihood of the tokens to imitate, summed. The critic takes no part, but DDP
    expects a gradient for every weight."""
    logp, value, _ = predict(model, rows)
    return -logp.sum() + 0.0 * value.sum()


def no_sync(model, unless):
    """Accumulate gradients locally; DDP averages them in the last micro-batch of a step."""
    if unless or not dist.is_initialized():
        return contextlib.nullcontext()
    return model.no_sync()


def backward(loss):
    """Add this process's share of the gradient of a loss. DDP averages, and we want the sum."""
    (loss * world_size()).backward()


def clip_and_step(model, optimizer, grad_clip):
    """End an optimizer step. Returns the norm of the gradient. If it is not finite, raises
    FloatingPointError in all processes, before any weight changes."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    if not np.isfinite(norm):
        raise FloatingPointError("a gradient is not finite: try a lower --primer-lr, --demos-lr "
                                 "or --ppo-lr")
    optimizer.step()
    return norm


# --- What update() gathers


def turn_rewards(traj):
    """What each turn of an episode earned: the last the share of right answers, the others 0."""
    return [0.0] * (len(traj.turns) - 1) + [traj.reward]


def segment_ends(lengths, device):
    """True at the last token of each of some consecutive segments, (sum of lengths,).

    >>> segment_ends([2, 3], "cpu").int().tolist()
    [0, 1, 0, 0, 1]
    """
    ends = torch.zeros(sum(lengths), dtype=torch.bool, device=device)
    ends[torch.tensor(lengths).cumsum(0) - 1] = True
    return ends


def minibatches(cfg, step, epoch):
    """The episodes of each minibatch, numbered over all processes, reshuffled every epoch.

    Process r plays the episodes e with e % world_size == r. They are shuffled within lanes of equal
    e % 8, so that 2, 4 or 8 processes have equally many of each minibatch (if 8 x ppo_minibatches
    divides the batch; else there is one lane).
    """
    order = keyed_rng(cfg.seed, Stream.PPO, step, epoch, 3).permutation(cfg.ppo_batch)
    lanes = 8 if cfg.ppo_batch % (8 * cfg.ppo_minibatches) == 0 else 1
    # One row per lane, shuffled within; a minibatch takes the same columns of each.
    order = order[np.argsort(order % lanes, kind="stable")].reshape(lanes, -1)  # (lanes, n / lanes)
    parts = np.array_split(order, cfg.ppo_minibatches, axis=1)
    return [sorted(part.flatten().tolist()) for part in parts]


def exercises(cfg, number):
    """This process's reading exercises beside a batch. Batches of demonstrations are numbered
    first, then minibatches of PPO; keys continue from the primer, so that none repeats."""
    key = cfg.primer_steps + number
    return [exercise(cfg, key, i, cfg.primer_longest) for i in share(cfg.exercises)]


def mean_over_episodes(trajs):
    """What to log of the episodes of all processes: {name: mean}."""
    stats = []
    for traj in trajs:
        shown, held = memory_recall(traj)
        stats.append(dict(
            reward=traj.reward, em=traj.env.em, of=traj.env.n_objectives, peak=traj.peak,
            turns=len(traj.turns), shown=shown, held=held,
            unpruned=len(visible_context(traj.env, keep_all, traj.turns))))  # in a full context
    means = mean_of(stats)
    shown, held = means.pop("shown"), means.pop("held")
    return dict(means, memory=held / shown if shown else 0.0)


# --- The maths, as pure functions


def token_rewards(earned, turn_ends, old_logp, ref_logp, kl_coef):
    """Reward of each token (M,): what its turn earned, at the turn's end, less the KL penalty.

    r_t = [t ends turn j] R_j - kl_coef (log pi_old(a_t) - log pi_ref(a_t))

    The second term is the one-sample ("k1") estimate of KL(pi || ref), not clamped at 0, since
    as a reward it gives an unbiased gradient of the KL. earned (J,) has one entry per turn;
    turn_ends (M,) is True at the last token of each turn.

    >>> ends, old = torch.tensor([False, True]), torch.tensor([-0.5, -0.5])
    >>> token_rewards(torch.tensor([1.0]), ends, old, torch.tensor([-1.0, -0.5]), kl_coef=0.1)
    tensor([-0.0500,  1.0000])
    """
    rewards = -kl_coef * (old_logp - ref_logp)  # (M,)
    rewards[turn_ends] += earned
    return rewards


def gae(rewards, value, episode_ends, gamma=1.0, lam=1.0):
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16): adv, ret (M,).

    delta_t = r_t + gamma V_{t+1} - V_t
    adv_t = delta_t + gamma lam adv_{t+1},   ret_t = adv_t + V_t

    After the last token of an episode V is 0, whether it answered or ran out of turns, since the
    turn budget is part of the task. With gamma = lam = 1, as in MEM1, adv_t is the sum of the
    rewards from t on, less V_t.

    >>> value, ends = torch.full((3,), 0.5), torch.tensor([False, False, True])
    >>> gae(torch.tensor([0.0, 0.0, 1.0]), value, ends)[0].tolist()
    [0.5, 0.5, 0.5]
    >>> gae(torch.tensor([0.0, 0.0, 1.0]), value, ends, lam=0.0)[0].tolist()
    [0.0, 0.0, 0.5]
    """
    r, v, end = rewards.tolist(), value.tolist(), episode_ends.tolist()
    adv = [0.0] * len(r)
    next_adv = next_value = 0.0
    for t in reversed(range(len(r))):
        if end[t]:
            next_adv = next_value = 0.0
        adv[t] = r[t] + gamma * next_value - v[t] + gamma * lam * next_adv
        next_adv, next_value = adv[t], v[t]
    adv = torch.tensor(adv, dtype=value.dtype, device=value.device)  # (M,)
    return adv, adv + value


def whiten(x):
    """x (M,) to mean 0 and variance 1 over the tokens of all processes. A constant becomes 0."""
    x, n = centered(x)
    var = all_reduce((x**2).sum()) / n
    return x * (var + 1e-8).rsqrt()


def centered(x):
    """x (..., M) minus its mean over the tokens of all processes, and the number of tokens."""
    n = all_reduce(torch.tensor(float(x.size(-1)), device=x.device))
    return x - all_reduce(x.sum(-1, keepdim=True)) / n, n


def policy_loss(logp, old_logp, adv, clip=0.2):
    """Clipped surrogate (arXiv 1707.06347, eq. 7): -min(ratio adv, clip(ratio) adv), (M,).

    The gradient stops where the ratio has gone far enough in the direction of the advantage:

    >>> logp = torch.tensor([0.7, 0.9, 1.1, 1.3]).log().requires_grad_()
    >>> for adv in torch.ones(4), -torch.ones(4):
    ...     torch.autograd.grad(policy_loss(logp, torch.zeros(4), adv).sum(), logp)[0]
    tensor([-0.7000, -0.9000, -1.1000,  0.0000])
    tensor([0.0000, 0.9000, 1.1000, 1.3000])
    """
    ratio = (logp - old_logp).exp()  # (M,): 1 before the first update, if sampler and learner agree
    return -torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)


def approx_kl(log_ratio):
    """KL(pi_old || pi), from samples of pi_old: (ratio - 1) - log ratio >= 0 ("k3"), (M,)."""
    return log_ratio.expm1() - log_ratio


def explained_variance(value, ret):
    """1 - Var(ret - value) / Var(ret): 1 is a perfect critic, 0 a constant one."""
    x, n = centered(torch.stack([ret, ret - value]))  # (2, M)
    of_ret, of_rest = all_reduce((x**2).sum(1)).tolist()
    return 1 - of_rest / of_ret if of_ret > 1e-12 * n else 0.0


# --- Several processes. All of them must make these calls, in the same order.


def rank():
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n):
    """This process's part of range(n)."""
    return range(rank(), n, world_size())


def mean_of(stats):
    """Means over a list of {name: number}, over all processes."""
    if dist.is_initialized():
        parts = [None] * world_size()
        dist.all_gather_object(parts, stats)
        stats = sum(parts, [])
    return {name: sum(one[name] for one in stats) / len(stats) for name in stats[0]}


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """The sum, or another operation, over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def token_count(batch, device):
    """Trained tokens in the Rows of all processes: what a sum of losses is divided by."""
    return all_reduce(torch.tensor(float(sum(len(rows.place) for rows in batch)), device=device))
