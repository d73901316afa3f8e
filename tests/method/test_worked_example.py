"""The whole method on six tokens, in numbers that a pocket calculator can check.

Six target tokens, a to f, of a training set; three groups. The example goes through the method in
its order: attribution, relevance, groups, group losses, weights, loss and gradient. The temperature
is 1 / ln 2 = 1.4427, so that exp(L / tau) is 2 ** L.
"""

import math

import numpy as np
import pytest
import torch

from attribution import cut, ratio
from gdrt import gdrt_loss, gdrt_rule, group_dro_rule, group_sums, group_weights, sft_rule

TAU = 1 / math.log(2)

#                 a    b    c    d     e    f
A_AUX = np.array([0.0, 0.5, 1.5, 2.0, -3.5, 4.0])  # nats owed to the auxiliary tokens
A_USER = np.array([4.5, 4.0, 3.0, -2.5, 1.0, 0.5])  # nats owed to the user's history
TIMES = np.array([6, 3, 3, 2, 2, 2])  # how often each token is a target in training
GROUP = torch.tensor([0, 1, 1, 2, 2, 2])  # follows from the three lines above, see below
NLL = torch.tensor([3.0, 1.0, 3.0, 0.0, 1.0, 2.0], dtype=torch.float64)  # in a batch with each once

# The batch's group means and numbers of tokens.
L = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)  # 3 / 1, (1 + 3) / 2, (0 + 1 + 2) / 3
N = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def test_1_relevance():
    """r = (|A_aux| + 0.5) / (|A_aux| + |A_user| + 0.5): the sign does not count.

    Every denominator is 5 here: for token d, (2 + 0.5) / (2 + 2.5 + 0.5) = 2.5 / 5.
    """
    assert ratio(A_AUX, A_USER) == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.8, 0.9])


def test_2_groups():
    """The 18 training tokens are cut into three groups of 6, the least relevant first.

    Group 0 is token a, six times; group 1 is b and c, 3 + 3; group 2 is d, e and f, 2 + 2 + 2.
    """
    group, cuts, shares = cut(ratio(A_AUX, A_USER), TIMES, 3)
    assert group.tolist() == GROUP.tolist()
    assert cuts == pytest.approx([0.1, 0.2, 0.5])  # the lowest r of each group
    assert shares == pytest.approx([6 / 18, 6 / 18, 6 / 18])


def test_3_group_losses():
    total, count = group_sums(NLL, GROUP, 3)
    assert total.tolist() == [3, 4, 3]
    assert count.tolist() == N.tolist()
    assert (total / count).tolist() == L.tolist()


def test_4_weights_of_the_groups():
    """q_g ~ prior_g exp(L_g / tau) = prior_g 2 ** L_g."""
    # Uniform prior: 2 ** 3, 2 ** 2, 2 ** 1 = 8, 4, 2; their sum is 14.
    assert group_weights(L, N, TAU).tolist() == pytest.approx([8 / 14, 4 / 14, 2 / 14])
    # Prior by share of the tokens: 1/6 of 8, 2/6 of 4, 3/6 of 2, that is 8, 8, 6 over 22.
    assert group_weights(L, N, TAU, "share").tolist() == pytest.approx([8 / 22, 8 / 22, 6 / 22])
    # The higher tau, the nearer q is to the prior; at infinity it is the prior.
    assert group_weights(L, N, math.inf).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert group_weights(L, N, math.inf, "share").tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_5_loss_and_gradient():
    """Loss 4/7 3 + 2/7 2 + 1/7 1 = 17/7; a token of group g weighs q_g / n_g."""
    nll = NLL.clone().requires_grad_()
    loss, q, group_loss = gdrt_loss(nll, GROUP, 3, TAU)
    assert group_loss.tolist() == [3, 2, 1]
    assert q.tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert loss.item() == pytest.approx(17 / 7)  # 2.4286; the mean of the six is 10/6 = 1.6667

    loss.backward()
    # (4/7) / 1, (2/7) / 2 twice, (1/7) / 3 three times. In plain fine-tuning each weighs 1/6.
    weights = [4 / 7, 1 / 7, 1 / 7, 1 / 21, 1 / 21, 1 / 21]
    assert nll.grad.tolist() == pytest.approx(weights)


def test_6_why_these_weights():
    """No other q gives more of sum_g q_g L_g - tau KL(q || prior), and q gives log2(14 / 3)."""

    def worth(q):
        return float((q * L).sum() - TAU * (q * (3 * q).log()).sum())  # KL to 1/3, 1/3, 1/3

    best = worth(torch.tensor([4 / 7, 2 / 7, 1 / 7], dtype=torch.float64))
    assert best == pytest.approx(math.log2(14 / 3))  # 2.2224
    for other in ([5 / 7, 1 / 7, 1 / 7], [3 / 7, 3 / 7, 1 / 7], [1 / 3, 1 / 3, 1 / 3]):
        assert worth(torch.tensor(other, dtype=torch.float64)) < best


def test_7_the_same_as_rules():
    """The loop of gdrt.py asks a rule for q: rule(group losses, counts, state) -> (q, state)."""
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    q, state = gdrt_rule(TAU, "uniform")(L, N, uniform)
    assert q.tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert state is uniform  # it remembers nothing

    # Plain fine-tuning: each group by its share of the tokens, so the loss is the mean, 10/6.
    q, state = sft_rule(L, N, uniform)
    assert q.tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert (q * L).sum().item() == pytest.approx(10 / 6)  # 3/6 + 4/6 + 3/6

    # Online group DRO remembers log q: each step multiplies q_g by exp(eta L_g), here 2 ** L_g.
    rule = group_dro_rule(math.log(2))
    q, state = rule(L, N, uniform)
    assert q.tolist() == pytest.approx([8 / 14, 4 / 14, 2 / 14])
    q, state = rule(L, N, state)  # 8 * 8, 4 * 4, 2 * 2 = 64, 16, 4; their sum is 84
    assert q.tolist() == pytest.approx([64 / 84, 16 / 84, 4 / 84])


def test_8_two_micro_batches_are_the_one_batch():
    """Add the group sums up first, then weigh: a, b, d and c, e, f give what all six give.

    Sums (3, 1, 0) + (0, 3, 3) = (3, 4, 3), counts (1, 1, 1) + (0, 1, 2) = (1, 2, 3). The model
    has one parameter, theta = 1; token i costs theta NLL_i. So the gradient of the loss is
    4/7 3 + 1/7 (1 + 3) + 1/21 (0 + 1 + 2) = 17/7.
    """
    theta = torch.ones((), dtype=torch.float64, requires_grad=True)
    parts = [torch.tensor([0, 1, 3]), torch.tensor([2, 4, 5])]
    sums = [group_sums(NLL[part], GROUP[part], 3) for part in parts]
    assert [total.tolist() for total, _ in sums] == [[3, 1, 0], [0, 3, 3]]
    total = sums[0][0] + sums[1][0]
    count = sums[0][1] + sums[1][1]
    weight = group_weights(total / count, count, TAU) / count  # 4/7, 1/7, 1/21
    for part in parts:
        (weight[GROUP[part]] * NLL[part] * theta).sum().backward()
    assert theta.grad.item() == pytest.approx(17 / 7)

    # Weighing each part by itself is another method: the first alone has L = (3, 1, 0) and
    # q ~ (8, 2, 1), loss 26/11; the second lacks group 0, L = (3, 1.5) in groups 1 and 2.
    loss, q, _ = gdrt_loss(NLL[parts[0]], GROUP[parts[0]], 3, TAU)
    assert q.tolist() == pytest.approx([8 / 11, 2 / 11, 1 / 11])
    assert loss.item() == pytest.approx(26 / 11)
    _, q, group_loss = gdrt_loss(NLL[parts[1]], GROUP[parts[1]], 3, TAU)
    assert group_loss.tolist() == [0, 3, 1.5]
    assert q[0] == 0
