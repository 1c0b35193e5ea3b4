"""Reference implementations in float64 NumPy, written from the papers and docstrings without vectorization.

Sequences are walked token by token and masked entries are deleted rather than multiplied by 0, so that a mistake in
the arrays' version has no counterpart here.
"""

from __future__ import annotations

import math

import numpy as np


def f32(x) -> np.ndarray:
    return np.asarray(x, np.float32)


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def numeric_grad(f, x, mask=None, step=1e-6):
    """Central differences of the scalar ``f`` at every (unmasked) entry of ``x``; 0 elsewhere."""
    x = np.array(x, np.float64)
    grad = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        if mask is None or mask[index]:
            up, down = x.copy(), x.copy()
            up[index] += step
            down[index] -= step
            grad[index] = (f(up) - f(down)) / (2 * step)
    return grad


# masked --------------------------------------------------------------------------------------------------------------


def mean(x, mask):
    kept = np.asarray(x, np.float64)[mask]
    return kept.mean() if kept.size else 0.0


def variance(x, mask, ddof=0):
    kept = np.asarray(x, np.float64)[mask]
    return ((kept - kept.mean()) ** 2).sum() / (kept.size - ddof) if kept.size > ddof else 0.0


def whiten(x, mask, *, shift_mean=True, epsilon=1e-8):
    x = np.asarray(x, np.float64)
    result = np.zeros(x.shape)
    centre = mean(x, mask)
    result[mask] = (x[mask] - centre) / math.sqrt(variance(x, mask) + epsilon) + (0 if shift_mean else centre)
    return result


def is_last(mask):
    result = np.zeros(mask.shape, bool)
    for row in range(mask.shape[0]):
        attended = [column for column in range(mask.shape[1]) if mask[row, column]]
        if attended:
            result[row, attended[-1]] = True
    return result


# log_probs -----------------------------------------------------------------------------------------------------------


def softcapped(logits, cap):
    logits = np.asarray(logits, np.float64)
    return logits if cap is None else cap * np.tanh(logits / cap)


def log_softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    shifted = scaled - scaled.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def token_log_probs(logits, ids, temperature=1.0):
    return np.take_along_axis(log_softmax(logits, temperature), np.asarray(ids)[..., None], -1)[..., 0]


def token_entropy(logits, temperature=1.0):
    log_p = log_softmax(logits, temperature)
    p = np.exp(log_p)
    return -(p * np.where(p > 0, log_p, 0)).sum(-1)


# advantage -----------------------------------------------------------------------------------------------------------


def std(values, ddof=1):
    values = np.asarray(values, np.float64)
    return math.sqrt(((values - values.mean()) ** 2).sum() / (values.size - ddof)) if values.size > ddof else 0.0


def group_relative(rewards, *, group_size, scale="group", ddof=1, epsilon=1e-6):
    rewards = np.asarray(rewards, np.float64)
    everyone = rewards[~np.isnan(rewards)]
    result = np.zeros(rewards.size)
    for start in range(0, rewards.size, group_size):
        present = [i for i in range(start, start + group_size) if not np.isnan(rewards[i])]
        if present:
            group = rewards[present]
            divisor = {"none": 1.0, "group": std(group, ddof) + epsilon, "batch": std(everyone, ddof) + epsilon}[scale]
            result[present] = (group - group.mean()) / divisor
    return result


def rloo(rewards, *, group_size):
    rewards = np.asarray(rewards, np.float64)
    result = np.zeros(rewards.size)
    for start in range(0, rewards.size, group_size):
        present = [i for i in range(start, start + group_size) if not np.isnan(rewards[i])]
        for i in present:
            others = [rewards[j] for j in present if j != i]
            result[i] = rewards[i] - np.mean(others) if others else 0.0
    return result


def reinforce_plus_plus(rewards, *, epsilon=1e-6):
    rewards = np.asarray(rewards, np.float64)
    present = ~np.isnan(rewards)
    result = np.zeros(rewards.size)
    if present.any():
        kept = rewards[present]
        result[present] = (kept - kept.mean()) / (std(kept) + epsilon)
    return result


def reinforce_plus_plus_baseline(rewards, *, group_size, epsilon=1e-6):
    centred = group_relative(rewards, group_size=group_size, scale="none")
    return np.nan_to_num(reinforce_plus_plus(np.where(np.isnan(rewards), np.nan, centred), epsilon=epsilon))


def gae(rewards, values, mask, *, gamma=1.0, lam=0.95):
    """The sum of ``(gamma lam)^l delta_{t+l}`` over the rest of each row after its masked steps are deleted."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(mask.shape[0]):
        steps = np.flatnonzero(mask[b])
        r, v = np.asarray(rewards[b], np.float64)[steps], np.asarray(values[b], np.float64)[steps]
        delta = r + gamma * np.append(v[1:], 0.0) - v if steps.size else r
        for i, t in enumerate(steps):
            advantages[b, t] = sum((gamma * lam) ** k * delta[i + k] for k in range(steps.size - i))
            returns[b, t] = advantages[b, t] + v[i]
    return advantages, returns


def token_rewards(rewards, kl, mask, *, kl_coef=0.0):
    result = np.zeros(mask.shape)
    for b in range(mask.shape[0]):
        steps = np.flatnonzero(mask[b])
        for t in steps:
            if kl is not None:
                result[b, t] -= kl_coef * float(kl[b, t])
            if t == steps[-1] and not np.isnan(rewards[b]):
                result[b, t] += float(rewards[b])
    return result


def process_supervised(rewards, is_step_end, *, group_size, ddof=1, epsilon=1e-6):
    """The steps of each group are collected in a list; a token sums over those that end at it or later."""
    rows, columns = is_step_end.shape
    result = np.zeros((rows, columns))
    for start in range(0, rows, group_size):
        steps = []
        for b in range(start, start + group_size):
            for t in range(columns):
                if is_step_end[b, t] and not np.isnan(rewards[b, t]):
                    steps.append((b, t, float(rewards[b, t])))
        if steps:
            values = [reward for _, _, reward in steps]
            centre, deviation = np.mean(values), std(values, ddof)
            for b in range(start, start + group_size):
                for t in range(columns):
                    later = [reward for row, end, reward in steps if row == b and end >= t]
                    result[b, t] = sum((reward - centre) / (deviation + epsilon) for reward in later)
    return result


def hybrid(rewards, values, mask, *, group_size, step_rewards=None, lam=1.0, epsilon=1e-6):
    rewards = np.asarray(rewards, np.float64)
    learnt_from = mask.copy()
    learnt_from[np.isnan(rewards)] = False
    per_token_rewards = token_rewards(rewards, None, learnt_from)
    if step_rewards is not None:
        for b, t in np.argwhere(learnt_from):
            per_token_rewards[b, t] += float(step_rewards[b, t])
    advantages, returns = gae(per_token_rewards, values, learnt_from, lam=lam)
    per_group_advantages = group_relative(rewards, group_size=group_size, epsilon=epsilon)
    for start in range(0, rewards.size, group_size):
        group = range(start, start + group_size)
        has_steps = step_rewards is not None and any(reward != 0 for i in group for reward in step_rewards[i])
        if len({rewards[i] for i in group if not np.isnan(rewards[i])}) > 1 and not has_steps:
            for i in group:
                advantages[i] = [per_group_advantages[i] if counts else 0.0 for counts in learnt_from[i]]
    return advantages, returns


def adapted_kl_coef(kl_coef, kl, *, target, horizon, num_samples):
    error = (kl - target) / target
    if error > 0.2:
        error = 0.2
    if error < -0.2:
        error = -0.2
    return kl_coef + kl_coef * error * num_samples / horizon


# loss ----------------------------------------------------------------------------------------------------------------
# A surrogate takes (ratio, ratio without gradient, advantage, log-probability) of one token.


def clipped(ratio, _, advantage, __, *, low=0.2, high=0.2, dual_clip=None):
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def cispo(_, frozen_ratio, advantage, log_prob, *, low=1.0, high=4.0):
    return -min(max(frozen_ratio, 1 - low), 1 + high) * advantage * log_prob


def sapo(ratio, _, advantage, __, *, positive=1.0, negative=1.05):
    tau = positive if advantage > 0 else negative
    return -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage


def k2(d):
    return d * d / 2


def k3(d):
    return math.exp(-d) - 1 + d


def grpo_loss(
    log_probs,
    advantages,
    mask,
    *,
    base=None,
    old=None,
    ref=None,
    rollout=None,
    entropy=None,
    per_sequence=False,
    surrogate=clipped,
    kl=k3,
    kl_coef=0.0,
    kl_correction=False,
    entropy_coef=0.0,
    cap=None,
    aggregate="sequence",
    length=None,
):
    """The loss as a number. ``base`` are the log-probabilities of terms without a gradient: ``log_probs``, unless these
    are varied to differentiate numerically."""
    log_probs = np.asarray(log_probs, np.float64)
    base = log_probs if base is None else np.asarray(base, np.float64)
    old = base if old is None else np.asarray(old, np.float64)
    rows = []
    for b in range(mask.shape[0]):
        steps = np.flatnonzero(mask[b])
        d = [log_probs[b, t] - old[b, t] for t in steps]
        frozen = [base[b, t] - old[b, t] for t in steps]
        if per_sequence and steps.size:
            ratios, frozen_ratios = [math.exp(np.mean(d))] * steps.size, [math.exp(np.mean(frozen))] * steps.size
        else:
            ratios, frozen_ratios = [math.exp(x) for x in d], [math.exp(x) for x in frozen]
        row = []
        for i, t in enumerate(steps):
            advantage = float(advantages[b] if np.ndim(advantages) == 1 else advantages[b, t])
            token = surrogate(ratios[i], frozen_ratios[i], advantage, log_probs[b, t])
            if cap is not None:
                assert rollout is not None
                token *= min(math.exp(old[b, t] - float(rollout[b, t])), cap)
            if kl_coef:
                assert ref is not None
                divergence = kl(log_probs[b, t] - float(ref[b, t]))
                token += kl_coef * divergence * (math.exp(d[i]) if kl_correction else 1.0)
            if entropy_coef:
                assert entropy is not None
                token -= entropy_coef * float(entropy[b, t])
            row.append(token)
        if row:
            rows.append(row)
    if not rows:
        return 0.0
    if aggregate == "token":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if aggregate == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    assert length is not None
    return sum(map(sum, rows)) / (length * len(rows))


# loss of preferences -------------------------------------------------------------------------------------------------
# An objective takes the margin of one pair.


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid_preference(margin, *, beta=0.1, label_smoothing=0.0, target_margin=0.0):
    x = beta * margin - target_margin
    labelled_right, labelled_wrong = -log_sigmoid(x), -log_sigmoid(-x)
    return (1 - label_smoothing) * labelled_right + label_smoothing * labelled_wrong


def hinge_preference(margin, *, beta=0.1):
    return max(0.0, 1 - beta * margin)


def squared_preference(margin, *, beta=0.1):
    return (margin - 1 / (2 * beta)) ** 2


def share_won(margins):
    return sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / len(margins)


def dpo_loss(log_probs, mask, ref=None, *, beta=0.1, objective=sigmoid_preference, per_token=False, sft_coef=0.0):
    """The loss and its metrics as numbers, one pair and one completion at a time."""
    losses, sums, ratios, nll = [], ([], []), ([], []), []
    for b in range(mask.shape[0]):
        for side in (0, 1):
            tokens = [float(log_probs[b, side, t]) for t in np.flatnonzero(mask[b, side])]
            ratio = sum(tokens) - (0.0 if ref is None else float(ref[b, side]))
            if per_token and tokens:
                ratio /= len(tokens)
            sums[side].append(sum(tokens))
            ratios[side].append(ratio)
            if side == 0:
                nll.append(-sum(tokens) / len(tokens) if tokens else 0.0)
        losses.append(objective(ratios[0][b] - ratios[1][b], beta=beta) + sft_coef * nll[b])
    margins = [chosen - rejected for chosen, rejected in zip(*ratios, strict=True)]
    metrics = {
        "rewards/chosen": beta * np.mean(ratios[0]),
        "rewards/rejected": beta * np.mean(ratios[1]),
        "rewards/margins": beta * np.mean(margins),
        "rewards/accuracies": share_won(margins),
        "logps/chosen": np.mean(sums[0]),
        "logps/rejected": np.mean(sums[1]),
        "nll_loss": np.mean(nll),
    }
    return sum(losses) / len(losses), {name: float(value) for name, value in metrics.items()}


def bradley_terry_loss(scores, *, margins=None, centring=0.0):
    losses, differences = [], []
    for b in range(len(scores)):
        chosen, rejected = float(scores[b][0]), float(scores[b][1])
        differences.append(chosen - rejected)
        to_win_by = 0.0 if margins is None else float(margins[b])
        losses.append(-log_sigmoid(chosen - rejected - to_win_by) + centring * (chosen + rejected) ** 2)
    metrics = {
        "accuracy": share_won(differences),
        "margin": sum(differences) / len(differences),
        "score/mean": float(np.mean(f64(scores))),
    }
    return sum(losses) / len(losses), metrics


# loss of a critic ----------------------------------------------------------------------------------------------------


def value_loss(values, returns, mask, *, old=None, epsilon=None):
    kept, errors, losses, clipped_larger = [], [], [], []
    for b, t in zip(*np.nonzero(mask), strict=True):
        value, target = float(values[b, t]), float(returns[b, t])
        errors.append((value - target) ** 2)
        kept.append(value)
        losses.append(errors[-1] / 2)
        if epsilon is not None:
            assert old is not None
            lowest, highest = float(old[b, t]) - epsilon, float(old[b, t]) + epsilon
            clipped_error = (min(max(value, lowest), highest) - target) ** 2
            clipped_larger.append(float(clipped_error > errors[-1]))
            losses[-1] = max(errors[-1], clipped_error) / 2
    metrics = {"value/mean": kept, "value/error": errors}
    if epsilon is not None:
        metrics["value/clip_ratio"] = clipped_larger

    def average(numbers):
        return sum(numbers) / len(numbers) if numbers else 0.0

    return average(losses), {name: average(numbers) for name, numbers in metrics.items()}


# sampling ------------------------------------------------------------------------------------------------------------


def kept_tokens(logits, *, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """The tokens of one row that the filters keep: temperature, top-k, top-p, min-p, each on the tokens kept before."""
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return {int(np.argmax(logits))}
    kept = [int(i) for i in np.argsort(-logits, kind="stable") if logits[i] > -np.inf]
    weight = np.exp((logits - logits.max()) / temperature)
    if top_k is not None:
        kept = [i for i in kept if logits[i] >= logits[kept[min(top_k, len(kept)) - 1]]]
    if top_p < 1:
        total, so_far, chosen = weight[kept].sum(), 0.0, []
        for i in kept:
            if so_far < top_p or logits[i] == logits[chosen[-1]]:
                chosen.append(i)
            so_far += weight[i] / total
        kept = chosen
    return {i for i in kept if weight[i] >= min_p * weight[kept[0]]}


def sampling_distribution(logits, **knobs):
    """The sampling distribution of one row."""
    kept = sorted(kept_tokens(logits, **knobs))
    result = np.zeros(len(logits))
    if knobs.get("temperature", 1.0) == 0:
        result[kept] = 1.0
    else:
        weight = np.exp((np.asarray(logits, np.float64)[kept] - np.max(logits)) / knobs.get("temperature", 1.0))
        result[kept] = weight / weight.sum()
    return result
