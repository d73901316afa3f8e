"""The losses against loops and searches that share no function with them."""
import math
import re
import subprocess
import sys
from decimal import Decimal, getcontext

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from gdrt import gdrt_loss, group_dro_loss, group_dro_step, group_means, group_weights


def draw(seed, n=23, k=4, scale=3.0, absent=None):
    random = torch.Generator().manual_seed(seed)
    nll = torch.rand(n, generator=random, dtype=torch.float64) * scale
    group = torch.randint(0, k, (n,), generator=random)
    if absent is not None:
        group[group == absent] = (absent + 1) % k
    return nll, group


def by_hand(nll, group, k, tau, prior):
    """tau log sum_g prior_g exp(L_g / tau) in plain Python."""
    means, shares = {}, {}
    for g in range(k):
        values = [float(x) for x, h in zip(nll, group) if int(h) == g]
        if values:
            means[g] = sum(values) / len(values)
            shares[g] = len(values) / len(nll) if prior == "share" else 1.0
    total = sum(shares.values())
    terms = {g: shares[g] / total * math.exp(means[g] / tau) for g in means}
    q = [terms.get(g, 0.0) / sum(terms.values()) for g in range(k)]
    return tau * math.log(sum(terms.values())), q, means


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), k=st.integers(1, 9), tau=st.floats(0.05, 50),
       prior=st.sampled_from(["uniform", "share"]))
def test_equals_a_loop(seed, n, k, tau, prior):
    nll, group = draw(seed, n, k)
    loss, q, means = gdrt_loss(nll, group, k, tau, prior)
    value, weights, by_group = by_hand(nll, group, k, tau, prior)
    assert loss.item() == pytest.approx(value, rel=1e-9)
    assert q.tolist() == pytest.approx(weights, abs=1e-9)
    assert [means[g].item() for g in by_group] == pytest.approx(list(by_group.values()))


@pytest.mark.parametrize("prior", ["uniform", "share"])
@pytest.mark.parametrize("tau", [0.1, 1.0, 7.0])
def test_is_the_maximum_over_q_of_the_penalised_objective(prior, tau):
    nll, group = draw(1)
    loss, q, means = gdrt_loss(nll, group, 4, tau, prior)
    anchor = torch.bincount(group, minlength=4) / len(group) if prior == "share" else torch.full((4,), 0.25)

    def objective(q):  # (..., 4)
        return (q * means).sum(-1) - tau * (q * (q / anchor).log()).sum(-1)
    assert objective(q).item() == pytest.approx(loss.item(), rel=1e-6)
    others = torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64)).sample((20000,))
    near = torch.softmax(q.log() + 0.01 * torch.randn(20000, 4, dtype=torch.float64), -1)
    for tried in (others, near):
        assert objective(tried).max() <= loss + 1e-7
    assert objective(near).max() > loss - 1e-3 * max(1, tau)


def test_infinite_tau_with_the_share_prior_is_sft():
    nll, group = draw(2)
    for tau in (math.inf, 1e9):
        assert gdrt_loss(nll, group, 4, tau, "share")[0].item() == pytest.approx(nll.mean().item(), rel=1e-8)


def test_large_tau_keeps_its_digits():
    getcontext().prec = 60
    nll, group = (x for x in draw(3))
    _, _, means = by_hand(nll, group, 4, 1.0, "uniform")
    for tau in (1e4, 1e7, 1e10):
        t = Decimal(tau)
        exact = t * (sum((Decimal(m) / t).exp() for m in means.values()) / len(means)).ln()
        assert gdrt_loss(nll, group, 4, tau)[0].item() == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("tau", [0.3, 2.0, math.inf])
def test_gradient(tau):
    nll, group = draw(4)
    nll.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gdrt_loss(x, group, 4, tau)[0], nll)
    loss, q, _ = gdrt_loss(nll, group, 4, tau)
    gradient, = torch.autograd.grad(loss, nll)
    for i, g in enumerate(group.tolist()):
        assert gradient[i].item() == pytest.approx(q[g].item() / group.tolist().count(g), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.01, 1.0, 1e6])
def test_huge_losses_stay_finite(dtype, tau):
    nll, group = torch.tensor([1e4, 2e4, 0.0, 3.0], dtype=dtype, requires_grad=True), torch.tensor([0, 1, 2, 3])
    loss, q, _ = gdrt_loss(nll, group, 4, tau)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(q).all() and torch.isfinite(nll.grad).all()
    moved = group_dro_loss(nll, group, torch.zeros(4, dtype=dtype), 100.0)[1]
    assert torch.isfinite(moved.exp()).all() and moved.exp().sum().item() == pytest.approx(1)


def test_order_and_labels_do_not_matter():
    nll, group = draw(5)
    loss, q, means = gdrt_loss(nll, group, 4, 0.7)
    shuffled = torch.randperm(len(nll))
    assert gdrt_loss(nll[shuffled], group[shuffled], 4, 0.7)[0].item() == pytest.approx(loss.item())
    label = torch.tensor([2, 0, 3, 1])
    other, weights, _ = gdrt_loss(nll, label[group], 4, 0.7)
    assert other.item() == pytest.approx(loss.item()) and torch.allclose(weights[label], q)


@pytest.mark.parametrize("prior", ["uniform", "share"])
def test_an_absent_group_takes_no_part(prior):
    nll, group = draw(6, absent=3)
    loss, q, means = gdrt_loss(nll, group, 4, 1.0, prior)
    alone, weights, _ = gdrt_loss(nll, group, 3, 1.0, prior)
    assert q[3] == 0 and loss.item() == pytest.approx(alone.item()) and torch.allclose(q[:3], weights)


def test_nothing_is_mutated_and_diagnostics_carry_no_gradient():
    nll, group = draw(7)
    nll.requires_grad_()
    log_q = torch.zeros(4, dtype=torch.float64)
    kept = nll.detach().clone(), group.clone(), log_q.clone()
    _, q, means = gdrt_loss(nll, group, 4, 1.0)
    _, moved, dro_means = group_dro_loss(nll, group, log_q, 0.1)
    assert torch.equal(nll, kept[0]) and torch.equal(group, kept[1]) and torch.equal(log_q, kept[2])
    assert not any(x.requires_grad for x in (q, means, moved, dro_means))


def test_micro_batches_share_one_q():
    """The gradient of the whole batch, rebuilt from parts that know only the batch's sums."""
    nll, group = draw(8, n=40)
    nll.requires_grad_()
    whole, = torch.autograd.grad(gdrt_loss(nll, group, 4, 0.5)[0], nll)
    count = torch.bincount(group, minlength=4).double()
    total = torch.zeros(4, dtype=torch.float64)
    for part in range(4):
        total += torch.bincount(group[part::4], weights=nll[part::4].detach(), minlength=4)
    q = group_weights(total / count, count, 0.5)
    summed = torch.zeros_like(nll)
    for part in range(4):
        terms = sum(q[g] / count[g] * nll[i] for i, g in list(enumerate(group))[part::4])
        summed += torch.autograd.grad(terms, nll)[0]
    assert torch.allclose(summed, whole, atol=1e-12)


def test_group_dro_follows_sagawa():
    """q_g <- q_g exp(eta L_g) for groups in the batch, then normalised, then loss = sum q_g L_g; three batches by hand."""
    q, log_q = [0.25] * 4, torch.zeros(4, dtype=torch.float64)
    for seed in range(3):
        nll, group = draw(seed, absent=seed)
        loss, log_q, _ = group_dro_loss(nll, group, log_q, 0.2)
        _, _, means = by_hand(nll, group, 4, 1.0, "uniform")
        q = [weight * math.exp(0.2 * means[g]) if g in means else weight for g, weight in enumerate(q)]
        q = [weight / sum(q) for weight in q]
        assert log_q.exp().tolist() == pytest.approx(q)
        assert loss.item() == pytest.approx(sum(q[g] * mean for g, mean in means.items()))


def test_wrong_arguments_are_named():
    nll, group = draw(9)
    for call in (lambda: gdrt_loss(nll, group, 4, 0.0), lambda: gdrt_loss(nll, group, 4, math.nan), lambda: gdrt_loss(nll, group, 2, 1.0),
                 lambda: gdrt_loss(nll, group - 1, 4, 1.0), lambda: gdrt_loss(nll, group, 4, 1.0, "shares"),
                 lambda: gdrt_loss(nll[:0], group[:0], 4, 1.0), lambda: group_means(nll, group[:3], 4),
                 lambda: group_dro_step(torch.zeros(4), torch.ones(4), torch.ones(4), 0.0)):
        with pytest.raises(ValueError):
            call()


def test_the_losses_can_be_pasted_into_an_empty_file(tmp_path):
    text = (ROOT / "gdrt.py").read_text()
    block = re.search(r"# -+ losses\n(.*?)# -+ ", text, re.S)[1]
    for function in re.split(r"(?m)^(?=def )", block)[1:]:
        assert len(function.strip().split("\n")) < 40, function.split("\n")[0]
    file = tmp_path / "pasted.py"
    file.write_text("import torch\n" + block + "\nnll = torch.tensor([1.0, 2.0, 4.0])\n"
                    "print(gdrt_loss(nll, torch.tensor([0, 0, 1]), 2, 1.0)[0].item())\n"
                    "print(group_dro_loss(nll, torch.tensor([0, 0, 1]), torch.zeros(2), 0.1)[0].item())\n")
    done = subprocess.run([sys.executable, "-I", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = math.log((math.exp(1.5) + math.exp(4)) / 2)
    q = math.exp(0.4) / (math.exp(0.15) + math.exp(0.4))
    assert [float(x) for x in done.stdout.split()] == pytest.approx([expected, (1 - q) * 1.5 + q * 4], rel=1e-6)
