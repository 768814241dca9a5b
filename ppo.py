"""ppo.py: proximal policy optimisation on the tokens that the agent chose, as pure functions.

There is no mask in this file. mem1.pack() lists the trained tokens of all episodes flat (M,), an episode
after the other, in the order in which they were sampled; a token that was given to the agent (the task,
an <info>, a state read again) is not in the list. So the token after an action is the next action, be it
a turn later, and credit flows through the whole episode (MEM1 sec. 3.3, app. A.5).

    M trained tokens;  logp, old_logp, ref_logp, value, adv, ret, last: all (M,)

Losses come back a token (M,); the caller divides their sum by the number of trained tokens of the
optimiser step in all processes, so that no split into micro-batches or processes changes the gradient.
"""
import torch


def token_rewards(reward, ends, old_logp, ref_logp, kl_coef):
    """Reward of each token (M,): a price for leaving the reference policy, and at the end of a turn what it earned.

    r_t = [t ends turn j] R_j - kl_coef (log pi_old(a_t) - log pi_ref(a_t))

    The second term is the one-sample ("k1") estimate of KL(pi || ref), not clamped at 0: in the reward
    its gradient is that of the KL (Schulman 2020, joschu.net/blog/kl-approx.html; MEM1 clamps it, which
    is biased). reward (J,), an entry a turn, and ends (M,), True at the last token of each, in the same order. As
    a rule only the last turn of an episode earns anything.
    """
    rewards = -kl_coef * (old_logp - ref_logp)  # (M,)
    rewards[ends] += reward
    return rewards


def gae(rewards, value, last, gamma=1.0, lam=1.0):
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16): adv, ret (M,).

    delta_t = r_t + gamma V_{t+1} - V_t,   adv_t = delta_t + gamma lam adv_{t+1},   ret_t = adv_t + V_t

    After the last token of an episode V is 0, whether it answered or ran out of turns: the turn budget
    is part of the task. With gamma = lam = 1, as in MEM1, adv_t = R - V_t.

    >>> one, end = torch.ones(3), torch.tensor([False, False, True])
    >>> gae(torch.tensor([0.0, 0.0, 1.0]), 0.5 * one, end)[0].tolist()
    [0.5, 0.5, 0.5]
    >>> gae(torch.tensor([0.0, 0.0, 1.0]), 0.5 * one, end, lam=0.0)[0].tolist()
    [0.0, 0.0, 0.5]
    """
    adv, ahead, value_ahead = [0.0] * len(last), 0.0, 0.0
    r, v, final = rewards.tolist(), value.tolist(), last.tolist()
    for t in reversed(range(len(adv))):
        if final[t]:
            ahead = value_ahead = 0.0
        ahead = r[t] + gamma * value_ahead - v[t] + gamma * lam * ahead
        adv[t], value_ahead = ahead, v[t]
    adv = torch.tensor(adv, dtype=value.dtype, device=value.device)  # (M,)
    return adv, adv + value


def whiten(x, total=lambda t: t):
    """x (M,) to mean 0 and variance 1 over the tokens of all processes; `total` sums a tensor over them.

    A constant becomes 0, not NaN.
    """
    n, s = total(torch.stack([torch.tensor(float(len(x)), device=x.device), x.sum()])).unbind()
    mean = s / n
    var = total(((x - mean) ** 2).sum()) / n
    return (x - mean) * (var + 1e-8).rsqrt()


def policy_loss(logp, old_logp, adv, clip=0.2):
    """Clipped surrogate (arXiv 1707.06347, eq. 7), to be minimised: -min(ratio adv, clip(ratio) adv), (M,)."""
    ratio = (logp - old_logp).exp()  # (M,): exactly 1 before the first update, if sampler and learner agree
    return -torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)


def value_loss(value, old_value, ret, clip=0.2):
    """Half the squared error of the new value, or of the new value held within +-clip of the old one, whichever is larger (M,).

    (arXiv 2005.12729 sec. 3; the baselines' PPO2.)
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.max((value - ret) ** 2, (near - ret) ** 2)


def approx_kl(logp, old_logp):
    """KL(pi_old || pi) a token from samples of pi_old, never negative ("k3"): (ratio - 1) - log ratio, (M,)."""
    log_ratio = logp - old_logp
    return log_ratio.expm1() - log_ratio


def clipped(logp, old_logp, clip=0.2):
    """1 where the ratio has left [1 - clip, 1 + clip], (M,)."""
    return ((logp - old_logp).exp() - 1).abs().gt(clip).float()


def explained_variance(value, ret, total=lambda t: t):
    """1 - Var(ret - value) / Var(ret) over the tokens of all processes: 1 is a perfect critic, 0 one that knows the mean only. A float."""
    x = torch.stack([ret, ret - value])  # (2, M)
    n = total(torch.tensor(float(x.size(1)), device=x.device))
    mean = total(x.sum(1)) / n  # (2,)
    of_ret, of_rest = total(((x - mean[:, None]) ** 2).sum(1)).tolist()
    return 1 - of_rest / of_ret if of_ret > 1e-12 * n else 0.0
