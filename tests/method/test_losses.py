"""The losses against loops, grids and decimals that share no function with them."""

import math
import re
import subprocess
import sys
from decimal import Decimal, localcontext

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from gdrt import gdrt_loss, group_dro_rule, group_sums, group_weights

BOTH = pytest.mark.parametrize("prior", ["uniform", "share"])


def draw(seed, n=23, k=4, absent=None):
    """NLL (n,) float64 in 0 .. 3 and groups (n,) of k, one of them kept empty if asked."""
    random = torch.Generator().manual_seed(seed)
    nll = torch.rand(n, generator=random, dtype=torch.float64) * 3
    group = torch.randint(0, k, (n,), generator=random)
    if absent is not None:
        group = torch.where(group == absent, (absent + 1) % k, group)
    return nll, group


def by_hand(nll, group, k, tau, prior="uniform"):
    """(sum q L, q of k groups, {group: mean}, {group: prior}) in plain Python."""
    members = {g: nll[group == g].tolist() for g in range(k)}
    means = {g: math.fsum(values) / len(values) for g, values in members.items() if values}
    anchor = {g: len(members[g]) / len(nll) if prior == "share" else 1 / len(means) for g in means}
    terms = {g: anchor[g] * math.exp(means[g] / tau) for g in means}
    total = math.fsum(terms.values())
    q = [terms.get(g, 0.0) / total for g in range(k)]
    return math.fsum(q[g] * means[g] for g in means), q, means, anchor


def objective(nll, group, k, tau, prior):
    """max_q sum_g q_g L_g - tau KL(q || prior) = tau log sum_g prior_g exp(L_g / tau), float64."""
    terms = []
    for g in range(k):
        inside = group == g
        if inside.any():
            share = inside.double().mean().log() if prior == "share" else torch.zeros(())
            terms.append(share + nll[inside].mean() / tau)
    normaliser = 0.0 if prior == "share" else math.log(len(terms))
    return tau * (torch.stack(terms).logsumexp(0) - normaliser)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    k=st.integers(1, 9),
    tau=st.floats(0.05, 50),
    prior=st.sampled_from(["uniform", "share"]),
)
def test_equals_a_loop(seed, n, k, tau, prior):
    nll, group = draw(seed, n, k)
    loss, q, means = gdrt_loss(nll, group, k, tau, prior)
    value, weights, by_group, _ = by_hand(nll, group, k, tau, prior)
    assert loss.item() == pytest.approx(value, rel=1e-12, abs=1e-12)
    assert q.tolist() == pytest.approx(weights, rel=1e-9, abs=1e-15)
    assert means.tolist() == pytest.approx([by_group.get(g, 0.0) for g in range(k)], rel=1e-12)


@BOTH
@pytest.mark.parametrize("tau", [0.2, 1.0, 7.0])
def test_is_the_maximum_over_q_of_the_penalised_objective(prior, tau):
    nll, group = draw(1, k=3)
    _, q, _ = gdrt_loss(nll, group, 3, tau, prior)
    loss = objective(nll, group, 3, tau, prior)
    _, _, means, anchor = by_hand(nll, group, 3, tau, prior)
    L = torch.tensor([means[g] for g in range(3)], dtype=torch.float64)
    p = torch.tensor([anchor[g] for g in range(3)], dtype=torch.float64)

    def penalised(q):  # (..., 3): sum_g q_g L_g - tau KL(q || prior), 0 log 0 = 0
        return (q * L).sum(-1) - tau * (torch.xlogy(q, q) - q * p.log()).sum(-1)

    side = 500
    a, b = torch.meshgrid(*[torch.arange(side + 1)] * 2, indexing="ij")
    simplex = torch.stack([a, b, side - a - b], -1)[a + b <= side].double() / side  # (points, 3)
    value, best = penalised(simplex).max(0)
    assert value <= loss + 1e-12
    assert value.item() == pytest.approx(loss.item(), abs=2e-5 * max(1, tau))
    assert simplex[best].tolist() == pytest.approx(q.tolist(), abs=2 / side)
    random = torch.Generator().manual_seed(0)
    steps = 1e-3 * torch.randn(20000, 3, dtype=torch.float64, generator=random)
    near = torch.softmax(q.log() + steps, -1)
    assert penalised(near).max() <= loss + 1e-12
    assert penalised(q).item() == pytest.approx(loss.item(), rel=1e-12)


@BOTH
@pytest.mark.parametrize("tau", [0.2, 1.0, 7.0, 1e3])
def test_the_gradient_is_that_of_the_maximised_objective(prior, tau):
    nll, group = draw(11, absent=1)
    nll.requires_grad_()
    (ours,) = torch.autograd.grad(gdrt_loss(nll, group, 4, tau, prior)[0], nll)
    (theirs,) = torch.autograd.grad(objective(nll, group, 4, tau, prior), nll)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-15)


def test_infinite_tau_is_the_prior_and_with_shares_plain_fine_tuning():
    nll, group = draw(2, absent=1)
    mean = math.fsum(nll.tolist()) / len(nll)
    for tau, close in ((math.inf, 1e-14), (1e9, 1e-8)):
        assert gdrt_loss(nll, group, 4, tau, "share")[0].item() == pytest.approx(mean, rel=close)
    loss, q, _ = gdrt_loss(nll, group, 4, math.inf, "uniform")
    assert q.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert loss.item() == pytest.approx(math.fsum(by_hand(nll, group, 4, 1.0)[2].values()) / 3)


@BOTH
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-14), (torch.float32, 3e-7)])
@pytest.mark.parametrize("tau", [1e2, 1e6, 1e10])
def test_large_tau_keeps_its_digits(tau, dtype, close, prior):
    nll, group = draw(3)
    _, _, means, anchor = by_hand(nll, group, 4, 1.0, prior)
    with localcontext() as context:
        context.prec = 60
        t = Decimal(tau)
        terms = {g: Decimal(anchor[g]) * (Decimal(means[g]) / t).exp() for g in means}
        exact = sum(terms[g] * Decimal(means[g]) for g in means) / sum(terms.values())
    loss = gdrt_loss(nll.to(dtype), group, 4, tau, prior)[0]
    assert loss.item() == pytest.approx(float(exact), rel=close)


def test_small_tau_keeps_its_digits():
    """One token far above 99,999 others in fp32: loss, q and gradient are as in closed form."""
    nll = torch.ones(100_000)
    group = torch.ones(100_000, dtype=torch.long)
    nll[0] = 50
    group[0] = 0
    nll.requires_grad_()
    loss, q, _ = gdrt_loss(nll, group, 2, 1.0, "share")
    loss.backward()
    assert loss.item() == pytest.approx(50, rel=1e-6)
    assert q[0].item() == pytest.approx(1) and nll.grad[0].item() == pytest.approx(1, rel=1e-5)
    # Both losses are exact in fp32, but their quotients by tau are not.
    q = group_weights(torch.tensor([1e4, 1e4 + 2**-7]), torch.ones(2), 0.003)
    assert q[0].item() == pytest.approx(1 / (1 + math.exp(2**-7 / 0.003)), rel=1e-5)


@BOTH
@pytest.mark.parametrize("tau", [0.3, 2.0, 50.0, math.inf])
def test_gradient_is_q_over_n(tau, prior):
    nll, group = draw(4, absent=2)
    nll.requires_grad_()
    (gradient,) = torch.autograd.grad(gdrt_loss(nll, group, 4, tau, prior)[0], nll)
    q = by_hand(nll, group, 4, min(tau, 1e12), prior)[1]
    expected = [q[g] / group.tolist().count(g) for g in group.tolist()]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.01, 1.0, 1e6])
def test_huge_losses_stay_finite(dtype, tau):
    nll = torch.tensor([1e4, 2e4, 0.0, 3.0], dtype=dtype, requires_grad=True)
    loss, q, _ = gdrt_loss(nll, torch.arange(4), 4, tau)
    loss.backward()
    terms = [math.exp((x - 2e4) / tau) for x in nll.tolist()]
    expected = sum(term * x for term, x in zip(terms, nll.tolist())) / sum(terms)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert nll.grad.tolist() == pytest.approx(q.tolist(), rel=1e-5)
    assert q.sum().item() == pytest.approx(1)
    moved = group_dro_rule(100.0)(nll.detach(), torch.ones(4), torch.zeros(4, dtype=dtype))[1]
    assert moved.exp().tolist() == [0, 1, 0, 0] and torch.isfinite(moved).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype):
    """A bf16 counter would stop at 256, and an fp16 sum overflow beyond 65,504."""
    nll = torch.full((4000,), 2.0, dtype=dtype)
    group = torch.arange(4000) % 4 // 3  # three tokens of group 0 to one of group 1
    nll[group == 1] = 72
    assert gdrt_loss(nll, group, 2, 1.0)[2].tolist() == [2, 72]
    assert group_sums(nll.float(), group, 2)[1].tolist() == [3000, 1000]


def test_order_and_labels_do_not_matter():
    nll, group = draw(5)
    loss, q, _ = gdrt_loss(nll, group, 4, 0.7, "share")
    shuffled = torch.randperm(len(nll), generator=torch.Generator().manual_seed(0))
    other, _, _ = gdrt_loss(nll[shuffled], group[shuffled], 4, 0.7, "share")
    assert other.item() == pytest.approx(loss.item(), rel=1e-12)
    label = torch.tensor([2, 0, 3, 1])
    other, weights, _ = gdrt_loss(nll, label[group], 4, 0.7, "share")
    assert other.item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(weights[label], q, rtol=1e-12)


@BOTH
@pytest.mark.parametrize("absent", [0, 2, 3])
def test_an_absent_group_takes_no_part(prior, absent):
    """Its mean, that of no tokens, may be 0, NaN or anything else."""
    nll, group = draw(6, absent=absent)
    loss, q, means = gdrt_loss(nll, group, 4, 0.5, prior)
    value, weights, _, _ = by_hand(nll, group, 4, 0.5, prior)
    assert q[absent] == 0
    assert loss.item() == pytest.approx(value)
    assert q.tolist() == pytest.approx(weights)
    count = torch.bincount(group, minlength=4)
    for stand_in in (0.0, 1e6, math.nan):
        means[absent] = stand_in
        q = group_weights(means, count, 0.5, prior)
        assert q.tolist() == pytest.approx(weights)


def test_nothing_is_mutated_and_diagnostics_carry_no_gradient():
    nll, group = draw(7, absent=1)
    nll.requires_grad_()
    log_q = torch.zeros(4, dtype=torch.float64)
    total, count = group_sums(nll, group, 4)
    means = total / count.clamp(min=1)
    inputs = nll, group, log_q, means, count
    kept = [x.detach().clone() for x in inputs]
    _, q, by_group = gdrt_loss(nll, group, 4, 1.0)
    weights = group_weights(means, count, 1.0, "share")
    group_dro_rule(0.1)(means.detach(), count, log_q)
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept))
    assert means.requires_grad
    assert not any(x.requires_grad for x in (q, by_group, weights))


def test_micro_batches_share_one_q():
    """Unequal parts that know only the batch's sums give the gradient of the whole batch.

    The first part lacks three groups.
    """
    nll, group = draw(8, n=40)
    group[:5] = 1
    nll.requires_grad_()
    (whole,) = torch.autograd.grad(gdrt_loss(nll, group, 4, 0.5)[0], nll)
    parts = [slice(0, 5), slice(5, 21), slice(21, 40)]
    total = torch.zeros(4, dtype=torch.float64)
    count = torch.zeros(4, dtype=torch.long)
    for part in parts:
        total += torch.bincount(group[part], weights=nll[part].detach(), minlength=4)
        count += torch.bincount(group[part], minlength=4)
    weight = group_weights(total / count, count, 0.5) / count  # (K,): q_g / n_g
    for part in parts:
        (weight[group[part]] * nll[part]).sum().backward()
    assert torch.allclose(nll.grad, whole, rtol=1e-12)


def test_group_dro_follows_sagawa():
    """q_g <- q_g exp(eta L_g) for groups in the batch, then normalised, then loss = sum q_g L_g.

    Four batches by hand.
    """
    q = [0.25] * 4
    log_q = torch.zeros(4, dtype=torch.float64)
    for seed in range(4):
        nll, group = draw(seed, absent=seed)
        nll.requires_grad_()
        total, count = group_sums(nll, group, 4)
        group_loss = total / count.clamp(min=1)
        weights, log_q = group_dro_rule(0.2)(group_loss.detach(), count, log_q)
        loss = (weights * group_loss).sum()
        means = by_hand(nll, group, 4, 1.0)[2]
        q = [weight * math.exp(0.2 * means.get(g, 0)) for g, weight in enumerate(q)]
        q = [weight / sum(q) for weight in q]
        assert log_q.exp().tolist() == pytest.approx(q, rel=1e-12)
        expected = sum(q[g] * mean for g, mean in means.items())
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, nll)
        by_token = [q[g] / group.tolist().count(g) for g in group.tolist()]
        assert gradient.tolist() == pytest.approx(by_token, rel=1e-9)


def test_compiles_in_one_piece():
    nll, group = draw(12, absent=2)
    compiled = torch.compile(gdrt_loss, fullgraph=True, backend="eager")
    for mine, theirs in zip(compiled(nll, group, 4, 0.7), gdrt_loss(nll, group, 4, 0.7)):
        assert torch.allclose(mine, theirs, rtol=1e-12)


def test_the_losses_can_be_pasted_into_an_empty_file(tmp_path):
    """The README's block, as it stands, with torch and nothing else; it is the module's text."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## The loss\n.*?```python\n(.*?)```", readme, re.S)[1]
    module = (ROOT / "gdrt.py").read_text(encoding="utf-8")
    functions = re.split(r"(?m)^(?=def )", block)[1:]
    assert [function.strip() in module for function in functions] == [True] * 3
    file = tmp_path / "pasted.py"
    file.write_text(
        block + "\nnll, group = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1])\n"
        "print(gdrt_loss(nll, group, 2, 1.0)[0].item())\n"
        "print(gdrt_loss(nll, group, 2, float('inf'), 'share')[0].item())\n"
    )
    done = subprocess.run([sys.executable, "-I", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    q = math.exp(4) / (math.exp(1.5) + math.exp(4))
    expected = [(1 - q) * 1.5 + q * 4, 7 / 3]
    assert [float(x) for x in done.stdout.split()] == pytest.approx(expected, rel=1e-6)
