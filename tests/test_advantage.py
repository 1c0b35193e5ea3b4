import inspect
from functools import partial

import chex
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from oracle import f32, f64

from grpo_jax.advantage import (
    adapted_kl_coef,
    dr_grpo,
    gae,
    gdpo,
    group_relative,
    hybrid,
    kl_penalized,
    process_supervised,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo,
    token_rewards,
    whitened,
)

B, T = 3, 6
NAN = np.nan

jit_group_relative = jax.jit(group_relative, static_argnames=("group_size", "scale", "ddof", "epsilon"))
jit_rloo = jax.jit(rloo, static_argnames="group_size")
jit_dr_grpo = jax.jit(dr_grpo, static_argnames="group_size")
jit_reinforce = jax.jit(reinforce_plus_plus)
jit_baseline = jax.jit(reinforce_plus_plus_baseline, static_argnames=("group_size", "epsilon"))
jit_gae = jax.jit(gae, static_argnames=("gamma", "lam"))

of_a_group = [
    partial(jit_group_relative, scale="group"),
    partial(jit_group_relative, scale="batch"),
    partial(jit_group_relative, scale="none"),
    jit_rloo,
    jit_dr_grpo,
    jit_baseline,
]
group_ids = ["group", "batch", "none", "rloo", "dr_grpo", "baseline"]

rewards_of_8 = hnp.arrays(
    np.float32,
    8,
    elements=st.one_of(
        st.sampled_from([0.0, 1.0, 0.7, -1.0, NAN]),
        st.floats(-10, 10, width=32),
        st.sampled_from([1e6, -1e6, 1e-3, 1e15, -1e15]),
    ),
)


def close(actual, expected, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol, atol=atol)


def gae_of_row(rewards, values, mask, **knobs):
    """Advantages and returns of one short sequence, computed as the first row of a padded batch."""
    row = [np.pad(np.asarray(x), ((0, B - 1), (0, T - len(x[0])))) for x in (rewards, values, mask)]
    return [np.asarray(x)[0, : len(mask[0])] for x in jit_gae(f32(row[0]), f32(row[1]), row[2], **knobs)]


def scale_of(rewards):
    return 1e-5 * max(1.0, float(np.nanmax(np.abs(np.append(rewards, 0)))))


# Group statistics ----------------------------------------------------------------------------------------------------


def test_a1_one_success_in_four():
    rewards = f32([1, 0, 0, 0, 0, 0, 1, 0])
    ours = jit_group_relative(rewards, group_size=4, scale="group", ddof=1, epsilon=1e-6)
    close(ours, [1.5, -0.5, -0.5, -0.5, -0.5, -0.5, 1.5, -0.5])


@pytest.mark.parametrize("value", [0.7, -0.1, 0.0, 1e6 + 0.1, 1e-20, 3.4e38])
@pytest.mark.parametrize("count", [4, 16])
def test_a2_equal_rewards_give_exactly_zero(value, count):
    rewards = np.full(2 * count, value, np.float32)
    for f in of_a_group:
        np.testing.assert_array_equal(f(rewards, group_size=count), 0)
    np.testing.assert_array_equal(jit_reinforce(rewards), 0)


def test_a2_equal_rewards_give_exactly_zero_without_epsilon_too():
    rewards = np.full(8, 0.7, np.float32)
    for scale in ("group", "batch"):
        np.testing.assert_array_equal(jit_group_relative(rewards, group_size=4, scale=scale, epsilon=0.0), 0)


def test_a2_groups_of_different_equal_rewards_give_exactly_zero():
    rewards = np.repeat(f32([0.7, 0.1]), 16)
    for f in of_a_group:
        np.testing.assert_array_equal(f(rewards, group_size=16), 0)


def test_a3_leave_one_out_on_one_failure_in_eight():
    close(jit_rloo(f32([0.0] + [0.95] * 7), group_size=8), [-0.95] + [0.95 / 7] * 7)


@pytest.mark.parametrize("f", of_a_group, ids=group_ids)
@pytest.mark.parametrize("group_size", [1, 0, -2])
def test_a4_a_group_too_small_for_a_statistic_is_refused_at_trace_time(f, group_size):
    with pytest.raises(ValueError, match=f"group_size is {group_size}.*at least 2"):
        jax.eval_shape(partial(f, group_size=group_size), np.zeros(4, np.float32))


@pytest.mark.parametrize("f", of_a_group, ids=group_ids)
def test_rewards_that_do_not_form_groups_are_refused_at_trace_time(f):
    with pytest.raises(ValueError, match="7 rewards do not form groups of 2"):
        jax.eval_shape(partial(f, group_size=2), np.zeros(7, np.float32))


def test_an_unknown_scale_is_refused_at_trace_time_and_the_known_ones_named():
    unchecked = inspect.unwrap(group_relative)  # without the tests' own check of annotated types
    with pytest.raises(ValueError, match="scale is 'std'; it is one of 'group', 'batch', 'none'"):
        jax.eval_shape(lambda r: unchecked(r, group_size=2, scale="std"), jnp.zeros(4))


@given(rewards_of_8, st.sampled_from([2, 4]), st.sampled_from(["group", "batch", "none"]), st.sampled_from([0, 1]))
def test_a5_group_relative_agrees_with_the_oracle(rewards, group_size, scale, ddof):
    ours = jit_group_relative(rewards, group_size=group_size, scale=scale, ddof=ddof, epsilon=1e-6)
    expected = oracle.group_relative(rewards, group_size=group_size, scale=scale, ddof=ddof)
    close(ours, expected, atol=scale_of(rewards) if scale == "none" else 1e-5)


@given(rewards_of_8, st.sampled_from([2, 4]))
def test_a5_leave_one_out_and_dr_grpo_agree_with_the_oracle(rewards, group_size):
    tolerance = scale_of(rewards)
    close(jit_rloo(rewards, group_size=group_size), oracle.rloo(rewards, group_size=group_size), atol=tolerance)
    expected = oracle.group_relative(rewards, group_size=group_size, scale="none")
    close(jit_dr_grpo(rewards, group_size=group_size), expected, atol=tolerance)


@given(rewards_of_8, st.sampled_from([2, 4]))
def test_a5_reinforce_plus_plus_agrees_with_the_oracle(rewards, group_size):
    close(jit_reinforce(rewards), oracle.reinforce_plus_plus(rewards))
    expected = oracle.reinforce_plus_plus_baseline(rewards, group_size=group_size)
    close(jit_baseline(rewards, group_size=group_size), expected)


def test_a5_statistics_are_over_those_present_and_the_absent_one_gets_0():
    rewards = f32([1.0, NAN, 0.0, 0.0, NAN, NAN, NAN, NAN])
    ours = jit_group_relative(rewards, group_size=4, scale="group")
    alone = oracle.group_relative([1.0, 0.0, 0.0], group_size=3)
    close(ours, [alone[0], 0, alone[1], alone[2], 0, 0, 0, 0])
    for f in of_a_group:
        ours = np.asarray(f(rewards, group_size=4))
        np.testing.assert_array_equal(ours[[1, 4, 5, 6, 7]], 0)
        assert np.isfinite(ours).all()


def test_a5_all_absent_and_one_alone_give_zero():
    for rewards in (np.full(8, NAN, np.float32), f32([5.0] + 7 * [NAN])):
        for f in of_a_group:
            np.testing.assert_array_equal(f(rewards, group_size=4), 0)
        np.testing.assert_array_equal(jit_reinforce(rewards), 0)


def test_a6_scale_by_batch_takes_the_mean_of_the_group_and_the_deviation_of_all():
    rewards = np.array([1.0, 0, 0, 0, 5, 5, 5, 6])
    deviation = rewards.std(ddof=1) + 1e-6
    expected = np.concatenate([rewards[:4] - rewards[:4].mean(), rewards[4:] - rewards[4:].mean()]) / deviation
    close(jit_group_relative(f32(rewards), group_size=4, scale="batch"), expected)


def test_dr_grpo_does_not_divide_and_the_population_deviation_is_ddof_0():
    rewards, centred = f32([1, 0, 0, 0] * 2), np.array([0.75, -0.25, -0.25, -0.25] * 2)
    close(jit_dr_grpo(rewards, group_size=4), centred)
    expected = centred / (np.sqrt(3) / 4 + 0.5)
    close(jit_group_relative(rewards, group_size=4, ddof=0, epsilon=0.5), expected)


def test_groups_are_adjacent_rows_and_do_not_mix():
    rewards = f32([1, 0, 10, 30, 2, 2, -5, 5])
    close(jit_dr_grpo(rewards, group_size=2), [0.5, -0.5, -10, 10, 0, 0, -5, 5])
    others = f32([1, 0, 0, 0, 9, 7, 1, 1])
    for f in (jit_dr_grpo, jit_rloo, jit_group_relative):
        np.testing.assert_array_equal(f(rewards, group_size=2)[:2], f(others, group_size=2)[:2])


def test_a_constant_added_to_all_rewards_changes_nothing():
    rewards = f32([1, 0, 0, 1, 1, 1, 0, 1])
    for f in of_a_group:
        close(f(rewards + f32(2**20), group_size=4), f(rewards, group_size=4))


def test_reinforce_plus_plus_standardizes_over_the_batch():
    rewards = np.array([3.0, 1, 4, 1, 5, 9, 2, 6])
    close(jit_reinforce(f32(rewards)), (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6))
    centred = np.concatenate([rewards[:4] - rewards[:4].mean(), rewards[4:] - rewards[4:].mean()])
    ours = jit_baseline(f32(rewards), group_size=4, epsilon=0.5)
    close(ours, centred / (centred.std(ddof=1) + 0.5))


# KL in the reward ----------------------------------------------------------------------------------------------------


def test_kl_in_the_reward_is_summed_over_the_completion_and_nothing_leaks_from_masked_steps():
    rewards, kl = jnp.array([1.0, 2.0, NAN]), jnp.array([[0.5, NAN, 0.25], [jnp.inf, NAN, NAN], [1.0, 1.0, 1.0]])
    mask = jnp.array([[True, False, True], [False, False, False], [True, True, True]])
    ours = jax.jit(partial(kl_penalized, kl_coef=0.5))(rewards, kl, mask)
    np.testing.assert_array_equal(ours, [1 - 0.375, 2, NAN])


jit_token_rewards = jax.jit(token_rewards)
jit_adapted = jax.jit(adapted_kl_coef, static_argnames=("target", "horizon", "num_samples"))


def sequences_of(seed, junk=np.nan, rows=B):
    """Rewards, some absent, and for each token a KL and a value, with junk where the mask has holes or empty rows."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, T)) < rng.choice([0.3, 0.7, 1.0])
    mask[rng.random(rows) < 0.2] = False
    rewards = f32(rng.choice([0.0, 1.0, 0.7, -2.5, NAN], rows, p=[0.3, 0.3, 0.1, 0.1, 0.2]))
    kl, values = (np.where(mask, f32(rng.normal(size=(rows, T))), f32(junk)) for _ in range(2))
    return rewards, kl, values, mask


def test_token_rewards_are_penalties_and_at_the_last_token_the_reward():
    rewards = f32([2.0, NAN, 5.0])
    kl = f32([[0.5, NAN, 1.0, -2.0, NAN, NAN], [1, 2, 3, 4, 5, 6], [NAN, np.inf, 0, 0, 0, 0]])
    mask = np.array([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=bool)
    ours = jit_token_rewards(rewards, kl, mask, kl_coef=0.1)
    # A reward that is absent leaves its penalties alone; an empty completion has no token for its reward.
    close(ours, [[-0.05, 0, -0.1, 0.2 + 2, 0, 0], [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6], [0] * 6])
    alone = [[0, 0, 0, 2, 0, 0], [0] * 6, [0] * 6]
    np.testing.assert_array_equal(jit_token_rewards(rewards, None, mask, kl_coef=0.1), alone)
    np.testing.assert_array_equal(jit_token_rewards(rewards, np.nan_to_num(kl), mask), alone)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 2.0]), st.sampled_from([NAN, np.inf, 100.0]))
def test_token_rewards_agree_with_the_oracle(seed, kl_coef, junk):
    rewards, kl, _, mask = sequences_of(seed, junk)
    ours = np.asarray(jit_token_rewards(rewards, kl, mask, kl_coef=f32(kl_coef)))
    close(ours, oracle.token_rewards(rewards, kl, mask, kl_coef=kl_coef))
    np.testing.assert_array_equal(ours[~mask], 0)
    expected = oracle.token_rewards(rewards, None, mask)
    np.testing.assert_array_equal(jit_token_rewards(rewards, None, mask, kl_coef=f32(kl_coef)), f32(expected))


def test_token_rewards_of_a_completion_sum_to_its_penalized_reward():
    rewards, kl, _, mask = sequences_of(3, rows=8)
    rewards, mask = np.nan_to_num(rewards), mask | (np.arange(T) == 2)
    kl = np.nan_to_num(kl)
    whole = jax.jit(partial(kl_penalized, kl_coef=0.3))(rewards, kl, mask)
    close(np.asarray(jax.jit(partial(token_rewards, kl_coef=0.3))(rewards, kl, mask)).sum(1), whole)


@given(
    st.floats(0.0625, 2, width=32),
    st.floats(-5, 30, width=32),
    st.sampled_from([(0.5, 10_000.0, 64), (6.0, 100.0, 256), (6.0, 1000.0, 1000)]),
)
def test_the_adapted_kl_coefficient_agrees_with_the_oracle(kl_coef, kl, knobs):
    knobs = dict(zip(("target", "horizon", "num_samples"), knobs, strict=True))
    close(jit_adapted(f32(kl_coef), f32(kl), **knobs), oracle.adapted_kl_coef(kl_coef, kl, **knobs))


def test_the_kl_coefficient_stays_on_target_and_changes_by_a_fifth_over_the_horizon_at_most():
    knobs = {"target": 6.0, "horizon": 1000.0, "num_samples": 1000}
    kl = f32([6.0, 6.6, 5.4, 7.2, 4.8, 600.0, 0.0, -3.0])
    ours = [jit_adapted(f32(0.5), x, **knobs) for x in kl]
    close(ours, 0.5 * np.array([1, 1.1, 0.9, 1.2, 0.8, 1.2, 0.8, 0.8]))
    close(jit_adapted(f32(0.5), f32(600), **{**knobs, "num_samples": 10}), 0.5 * 1.002, rtol=1e-6, atol=0)


# Generalized advantage estimation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [100.0, NAN, np.inf])
def test_a7_nothing_leaks_from_masked_steps(junk):
    advantages, returns = gae_of_row([[0.0, 1, 0]], [[0.0, 0, junk]], [[True, True, False]], gamma=1.0, lam=0.95)
    close(advantages, [0.95, 1, 0])
    close(returns, [0.95, 1, 0])


def test_a8_a_hole_in_the_mask_is_carried_over_as_if_it_were_not_there():
    without = gae_of_row([[0.1, 0.2, 0.3]], [[1.0, -2.0, 0.5]], [[True] * 3], gamma=0.9, lam=0.8)
    mask = [[True, False, False, True, True]]
    holed = gae_of_row([[0.1, 7, NAN, 0.2, 0.3]], [[1.0, NAN, 7, -2.0, 0.5]], mask, gamma=0.9, lam=0.8)
    for ours, expected in zip(holed, without, strict=True):
        close(ours, [expected[0], 0, 0, expected[1], expected[2]])


@given(
    hnp.arrays(np.float32, (B, T), elements=st.floats(-10, 10, width=32)),
    hnp.arrays(np.float32, (B, T), elements=st.floats(-10, 10, width=32)),
    hnp.arrays(np.bool_, (B, T)),
    st.sampled_from([(1.0, 0.95), (0.9, 0.8), (1.0, 1.0)]),
    st.sampled_from([NAN, np.inf, 100.0]),
)
def test_gae_agrees_with_the_oracle(rewards, values, mask, knobs, junk):
    gamma, lam = knobs
    bad_rewards, bad_values = np.where(mask, rewards, f32(junk)), np.where(mask, values, f32(junk))
    ours = jit_gae(bad_rewards, bad_values, mask, gamma=gamma, lam=lam)
    for actual, expected in zip(ours, oracle.gae(rewards, values, mask, gamma=gamma, lam=lam), strict=True):
        close(actual, expected, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(actual)[~mask], 0)


def test_gae_with_lambda_0_is_one_step_and_with_lambda_1_is_monte_carlo():
    rewards, values, mask = [[1.0, 2, 3]], [[0.5, -1, 4]], [[True] * 3]
    one_step, _ = gae_of_row(rewards, values, mask, gamma=0.9, lam=0.0)
    close(one_step, [1 + 0.9 * -1 - 0.5, 2 + 0.9 * 4 + 1, 3 - 4])
    _, monte_carlo = gae_of_row(rewards, values, mask, gamma=0.9, lam=1.0)
    close(monte_carlo, [1 + 0.9 * (2 + 0.9 * 3), 2 + 0.9 * 3, 3])


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(1.0, 0.95), (0.9, 0.8), (1.0, 1.0)]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([NAN, np.inf, 100.0]),
)
def test_advantages_of_penalized_token_rewards_are_the_mixture_of_all_n_step_estimates(seed, knobs, kl_coef, junk):
    """The left side of eq. 16 of arXiv 1506.02438, written out: nothing of the recursion is in it."""
    gamma, lam = knobs
    rewards, kl, values, mask = sequences_of(seed, junk)
    of_tokens = jit_token_rewards(rewards, kl, mask, kl_coef=f32(kl_coef))
    advantages, returns = (np.asarray(x) for x in jit_gae(of_tokens, values, mask, gamma=gamma, lam=lam))
    expected = np.zeros(mask.shape)
    for b in range(B):
        steps = [t for t in range(T) if mask[b, t]]
        for i, t in enumerate(steps):
            left, so_far = steps[i:], 0.0
            for n, u in enumerate(left, 1):
                so_far += gamma ** (n - 1) * -kl_coef * float(kl[b, u])
                if n < len(left):
                    estimate = so_far + gamma**n * float(values[b, left[n]])
                    share = (1 - lam) * lam ** (n - 1)
                else:
                    estimate = so_far + gamma ** (n - 1) * float(np.nan_to_num(rewards[b]))
                    share = lam ** (n - 1)
                expected[b, t] += share * (estimate - float(values[b, t]))
    close(advantages, expected)
    close(returns, np.where(mask, expected + np.where(mask, f64(values), 0), 0))
    np.testing.assert_array_equal(advantages[~mask], 0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1.0, 0.95), (0.9, 0.8)]))
def test_advantages_of_penalized_token_rewards_are_those_of_verl_in_torch(seed, knobs):
    gamma, lam = knobs
    rewards, kl, values, mask = sequences_of(seed, junk=100.0)
    rewards = np.nan_to_num(rewards)
    ours = jit_gae(jit_token_rewards(rewards, kl, mask, kl_coef=0.3), values, mask, gamma=gamma, lam=lam)
    response_mask, values = torch.tensor(f64(mask)), torch.tensor(f64(values))
    token_level_rewards = -0.3 * torch.tensor(f64(kl)) * response_mask
    for b in np.flatnonzero(mask.any(1)):
        token_level_rewards[b, int(torch.nonzero(response_mask[b]).max())] += float(rewards[b])
    nextvalues, lastgaelam, advantages = torch.zeros(B).double(), torch.zeros(B).double(), []
    for t in reversed(range(T)):
        delta = token_level_rewards[:, t] + gamma * nextvalues - values[:, t]
        now = delta + gamma * lam * lastgaelam
        nextvalues = values[:, t] * response_mask[:, t] + (1 - response_mask[:, t]) * nextvalues
        lastgaelam = now * response_mask[:, t] + (1 - response_mask[:, t]) * lastgaelam
        advantages.append(lastgaelam)
    advantages = torch.stack(advantages[::-1], 1)
    close(ours[0], advantages * response_mask)
    close(ours[1], (advantages + values) * response_mask)


# Process supervision -------------------------------------------------------------------------------------------------

jit_process = jax.jit(process_supervised, static_argnames=("group_size", "ddof", "epsilon"))


def test_process_supervision_sums_the_normalised_rewards_of_the_steps_to_come():
    rewards = f32([[9, 1, 9, 0, 9, 9], [0, 9, 9, 9, 2, 9], [9, 9, 5, 9, 9, 9], [9, NAN, 9, 7, 9, 9]])
    ends = np.array([[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0]], dtype=bool)
    first = (np.array([1, 0, 0, 2]) - 0.75) / (np.std([1, 0, 0, 2], ddof=1) + 1e-6)
    second = (np.array([5, 7]) - 6) / (np.sqrt(2) + 1e-6)
    expected = [
        [first[0] + first[1]] * 2 + [first[1]] * 2 + [0] * 2,
        [first[2] + first[3]] + [first[3]] * 4 + [0],
        [second[0]] * 3 + [0] * 3,
        [second[1]] * 4 + [0] * 2,  # the step whose reward is absent is left out, and the mean is of the others
    ]
    close(jit_process(rewards, ends, group_size=2), expected)


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([(2, 1, 1e-6), (4, 0, 0.5)]), st.sampled_from([NAN, np.inf, -np.inf, 9])
)
def test_process_supervision_agrees_with_the_oracle_whatever_stands_elsewhere(seed, knobs, junk):
    rng = np.random.default_rng(seed)
    ends = rng.random((8, T)) < rng.choice([0.1, 0.4, 0.9])
    ends[rng.random(8) < 0.2] = False
    kinds = [rng.choice([0.0, 1.0, 0.7, NAN], ends.shape), rng.normal(size=ends.shape) * 3 + rng.choice([0, 100])]
    rewards = np.where(ends, f32(kinds[rng.integers(2)]), f32(junk))
    group_size, ddof, epsilon = knobs
    ours = np.asarray(jit_process(rewards, ends, group_size=group_size, ddof=ddof, epsilon=epsilon))
    close(ours, oracle.process_supervised(rewards, ends, group_size=group_size, ddof=ddof, epsilon=epsilon))
    after = np.cumsum((ends & ~np.isnan(rewards))[:, ::-1], 1)[:, ::-1] == 0
    np.testing.assert_array_equal(ours[after], 0)


def test_process_supervision_by_the_outcome_alone_is_the_groups_advantage():
    rewards = f32([1, 0, 0, NAN, 5, 7, 7, 8])
    ends = np.arange(T) == np.array([3, 1, 5, 2, 0, 4, 3, 3])[:, None]
    ours = jit_process(np.where(ends, rewards[:, None], f32(NAN)), ends, group_size=4)
    expected = np.asarray(jit_group_relative(rewards, group_size=4))
    until_its_end = np.cumsum(ends[:, ::-1], 1)[:, ::-1] == 1
    close(ours, np.where(until_its_end, expected[:, None], 0))


@pytest.mark.parametrize("value", [0.7, 1e6 + 0.1, 3.4e38])
def test_a2_steps_of_equal_rewards_a_single_step_and_none_give_exactly_zero(value):
    ends = np.random.default_rng(0).random((8, T)) < 0.6
    rewards = np.full((8, T), value, np.float32)
    one = np.zeros((8, T), bool)
    one[5, 2] = True
    for is_step_end in (ends, one, np.zeros((8, T), bool)):
        np.testing.assert_array_equal(jit_process(rewards, is_step_end, group_size=2), 0)
    np.testing.assert_array_equal(jit_process(np.full((8, T), NAN, np.float32), ends, group_size=2), 0)


# A critic where the group says nothing -------------------------------------------------------------------------------

jit_hybrid = jax.jit(hybrid, static_argnames=("group_size", "lam", "epsilon"))


def test_a_group_that_differs_has_its_own_advantage_and_one_that_is_alike_the_critics():
    rewards = f32([1, 0, 1, 1, 0, NAN, NAN, NAN])
    _, _, values, mask = sequences_of(5, rows=8)
    mask = mask | (np.arange(T) == 2)
    values = np.where(np.isnan(values), f32(0.5), values)
    advantages, returns = (np.asarray(x) for x in jit_hybrid(rewards, values, mask, group_size=2))
    deviation = np.sqrt(0.5) + 1e-6
    close(advantages[:2], np.where(mask[:2], [[0.5 / deviation], [-0.5 / deviation]], 0))
    # At lambda 1 an advantage is the reward less the value: rows 2 and 3 are alike, row 4 has nobody to differ from.
    close(advantages[2:5], np.where(mask[2:5], rewards[2:5, None] - f64(values[2:5]), 0))
    close(returns[:5], np.where(mask[:5], rewards[:5, None], 0))  # of every completion that has a reward
    np.testing.assert_array_equal(advantages[5:], 0)
    np.testing.assert_array_equal(returns[5:], 0)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(2, 1.0, 1e-6), (4, 0.8, 0.5)]),
    st.sampled_from([NAN, np.inf, 100.0]),
)
def test_hybrid_agrees_with_the_oracle(seed, knobs, junk):
    rewards, _, values, mask = sequences_of(seed, junk, rows=8)
    group_size, lam, epsilon = knobs
    if seed % 2:
        rewards[:4] = np.where(np.isnan(rewards[:4]), f32(NAN), f32(0.7))  # alike but for those absent
    ours = jit_hybrid(rewards, values, mask, group_size=group_size, lam=lam, epsilon=epsilon)
    expected = oracle.hybrid(rewards, values, mask, group_size=group_size, lam=lam, epsilon=epsilon)
    for actual, twin in zip(ours, expected, strict=True):
        close(actual, twin)
        np.testing.assert_array_equal(np.asarray(actual)[~mask | np.isnan(rewards)[:, None]], 0)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(2, 1.0, 1e-6), (4, 0.8, 0.5)]),
    st.sampled_from([NAN, np.inf, 100.0]),
)
def test_hybrid_with_rewards_of_steps_agrees_with_the_oracle(seed, knobs, junk):
    rewards, _, values, mask = sequences_of(seed, junk, rows=8)
    group_size, lam, epsilon = knobs
    rng = np.random.default_rng(seed)
    steps = np.where(mask & (rng.random(mask.shape) < 0.4), f32(rng.choice([1.0, 0.25, -2.0], mask.shape)), f32(0))
    steps[:group_size] *= f32(seed % 2)  # a group without any, whose rewards may differ
    ours = jit_hybrid(rewards, values, mask, group_size=group_size, step_rewards=steps, lam=lam, epsilon=epsilon)
    expected = oracle.hybrid(rewards, values, mask, group_size=group_size, step_rewards=steps, lam=lam, epsilon=epsilon)
    for actual, twin in zip(ours, expected, strict=True):
        close(actual, twin)
        np.testing.assert_array_equal(np.asarray(actual)[~mask | np.isnan(rewards)[:, None]], 0)


def test_hybrid_with_steps_that_are_worth_nothing_is_hybrid_without():
    rewards, _, values, mask = sequences_of(3, rows=8)
    values = np.where(np.isnan(values), f32(0), values)
    without = jit_hybrid(rewards, values, mask, group_size=4)
    nothing = jit_hybrid(rewards, values, mask, group_size=4, step_rewards=np.zeros(mask.shape, np.float32))
    chex.assert_trees_all_equal(nothing, without)


def test_a_sample_at_the_mean_of_a_group_that_differs_has_no_advantage_whatever_the_critic_says():
    rewards, values = f32([0, 0.5, 1, 0.5, 0, 0, 0, 0]), np.full((8, T), 9, np.float32)
    advantages, _ = jit_hybrid(rewards, values, np.ones((8, T), bool), group_size=4, lam=0.8, epsilon=0.5)
    np.testing.assert_array_equal(np.asarray(advantages)[[1, 3]], 0)
    assert (np.asarray(advantages)[[0, 2, 4, 5, 6, 7]] != 0).all()


@pytest.mark.parametrize("value", [0.7, -0.1, 1e6 + 0.1])
def test_equal_rewards_are_alike_whatever_their_value_and_number(value):
    rewards, mask = np.full(16, value, np.float32), np.ones((16, 2), bool)
    advantages, _ = jit_hybrid(rewards, np.zeros((16, 2), np.float32), mask, group_size=16)
    close(advantages, np.full((16, 2), rewards[0]))  # the mean of 16 rounds, and is none of them


@pytest.mark.parametrize("name", ["process_supervised", "hybrid"])
@pytest.mark.parametrize(
    ("group_size", "message"),
    [(1, "group_size is 1.*at least 2"), (0, "group_size is 0"), (3, "8 rewards do not form groups of 3")],
)
def test_a4_groups_that_are_none_are_refused_at_trace_time(name, group_size, message):
    x, mask = np.zeros((8, T), np.float32), np.ones((8, T), bool)
    arguments = (x, mask) if name == "process_supervised" else (x[:, 0], x, mask)
    f = {"process_supervised": process_supervised, "hybrid": hybrid}[name]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(f, group_size=group_size), *arguments)


# Whitening -----------------------------------------------------------------------------------------------------------


def test_a9_whitened_advantages_have_mean_0_and_variance_1_over_unmasked_tokens_only():
    rng = np.random.default_rng(0)
    advantages, mask = f32(rng.normal(size=(B, T)) * 2 + 3), rng.random((B, T)) < 0.7
    ours = np.asarray(jax.jit(whitened)(np.where(mask, advantages, f32(NAN)), mask))
    close(ours, oracle.whiten(advantages, mask))
    close(oracle.mean(ours, mask), 0)
    close(oracle.variance(ours, mask), 1)
    np.testing.assert_array_equal(ours[~mask], 0)


# GDPO ---------------------------------------------------------------------------------------------------------------

jit_gdpo = jax.jit(gdpo, static_argnames=("group_size", "epsilon", "require_all"))


def gdpo_oracle(parts, weights, group_size, require_all):
    """In float64, with the loops written out."""
    parts = np.asarray(parts, np.float64)
    present = ~(np.isnan(parts).any(0) if require_all else np.isnan(parts).all(0))
    total = np.zeros(parts.shape[1])
    for part, weight in zip(parts, weights, strict=True):
        for start in range(0, len(part), group_size):
            rows = np.arange(start, start + group_size)
            rows = rows[present[rows] & ~np.isnan(part[rows])]
            if len(rows):
                centred = part[rows] - part[rows].mean()
                deviation = np.sqrt((centred**2).sum() / max(len(rows) - 1, 1))
                total[rows] += weight * centred / (deviation + 1e-6)
    kept = total[present]
    standardized = np.zeros(parts.shape[1])
    if kept.size:
        deviation = np.sqrt(((kept - kept.mean()) ** 2).sum() / max(kept.size - 1, 1))
        standardized[present] = (kept - kept.mean()) / (deviation + 1e-6)
    return standardized


@given(
    hnp.arrays(np.float32, (2, 8), elements=st.sampled_from([0.0, 1.0, 0.5, -2.0, NAN])),
    st.tuples(st.sampled_from([1.0, 0.5, 3.0]), st.sampled_from([1.0, -0.25])),
)
def test_gdpo_against_float64(parts, weights):
    for require_all, left_out in ((True, np.isnan(parts).any(0)), (False, np.isnan(parts).all(0))):
        ours = jit_gdpo(jnp.asarray(parts), f32(weights), group_size=4, require_all=require_all)
        close(ours, gdpo_oracle(parts, weights, 4, require_all), atol=2e-5)
        assert (np.asarray(ours)[left_out] == 0).all()


def test_gdpo_tells_apart_what_a_sum_does_not():
    """Two ways to a sum of 1; the rarer part has the larger weight."""
    parts = jnp.array([[1.0, 0, 1, 1], [0, 1, 0, 0]])
    summed = group_relative(parts.sum(0), group_size=4)
    assert np.asarray(summed).tolist() == [0] * 4
    ours = np.asarray(jit_gdpo(parts, jnp.array([1.0, 2.0]), group_size=4))
    assert ours[1] > 0 > ours[0] == ours[2] == ours[3]


def test_gdpo_of_one_reward_has_the_order_of_the_groups_advantage():
    rewards = jnp.array([0.0, 1, 1, 1, 0, 0, 0, 1])
    ours, usual = jit_gdpo(rewards[None], jnp.array([1.0]), group_size=4), group_relative(rewards, group_size=4)
    assert np.corrcoef(ours, usual)[0, 1] > 0.99


def test_gdpo_needs_groups():
    with pytest.raises(ValueError, match="do not form groups of 3"):
        gdpo(jnp.array([[1.0, 0, 1, 1]]), jnp.array([1.0]), group_size=3)


# Arguments -----------------------------------------------------------------------------------------------------------

x_of_tokens, ones = jnp.zeros((8, T)), jnp.ones((8, T), bool)
of_rewards = {
    "group_relative": partial(inspect.unwrap(group_relative), group_size=4),
    "rloo": partial(inspect.unwrap(rloo), group_size=4),
    "reinforce_plus_plus": inspect.unwrap(reinforce_plus_plus),
    "reinforce_plus_plus_baseline": partial(inspect.unwrap(reinforce_plus_plus_baseline), group_size=4),
    "kl_penalized": lambda rewards: inspect.unwrap(kl_penalized)(rewards, x_of_tokens, ones, kl_coef=0.1),
    "token_rewards": lambda rewards: inspect.unwrap(token_rewards)(rewards, None, ones),
    "hybrid": lambda rewards: inspect.unwrap(hybrid)(rewards, x_of_tokens, ones, group_size=4),
    "gdpo": lambda rewards: inspect.unwrap(gdpo)(rewards, jnp.ones(1), group_size=4),
    "gae": lambda rewards: inspect.unwrap(gae)(rewards, x_of_tokens, ones),
    "process_supervised": lambda rewards: inspect.unwrap(process_supervised)(rewards, ones, group_size=4),
}  # as users call them: without the tests' check of annotations


@pytest.mark.parametrize("name", of_rewards)
def test_rewards_that_are_a_list_or_of_another_rank_are_refused_with_what_to_pass(name):
    f = of_rewards[name]
    with pytest.raises(TypeError, match=r"rewards is a list; pass an array, such as jnp\.asarray\(rewards\)"):
        f([1.0, 0.0] * 4)
    with pytest.raises(AssertionError, match=r"has rank 3 .* but expected [12]\. \[rewards\]"):
        jax.eval_shape(f, jnp.zeros((8, 1, 1)))


def test_shapes_that_do_not_fit_are_refused_at_trace_time_and_named():
    for f, arrays, name in [
        (inspect.unwrap(gae), (x_of_tokens, x_of_tokens[:, 1:], ones), "values"),
        (inspect.unwrap(gae), (x_of_tokens, x_of_tokens, ones[:, 1:]), "mask"),
        (partial(inspect.unwrap(process_supervised), group_size=4), (x_of_tokens, ones[:, 0]), "is_step_end"),
        (
            partial(inspect.unwrap(gdpo), group_size=4),
            (jnp.zeros((2, 8)), jnp.ones(3)),
            "reward_weights: one per reward",
        ),
    ]:
        with pytest.raises(AssertionError, match=rf"\[{name}\]"):
            jax.eval_shape(f, *arrays)


def test_the_kl_coefficient_of_the_reward_may_be_traced():
    chex.clear_trace_counter()
    rewards, kl, _, mask = sequences_of(3, rows=8)

    def both(kl_coef):
        arrays = (jnp.asarray(rewards), jnp.asarray(kl), jnp.asarray(mask))
        return kl_penalized(*arrays, kl_coef=kl_coef), token_rewards(*arrays, kl_coef=kl_coef)

    traced = jax.jit(chex.assert_max_traces(both, n=1))
    for kl_coef in (0.3, 0.0):
        chex.assert_trees_all_close(traced(f32(kl_coef)), both(kl_coef), rtol=1e-6, atol=1e-6)
