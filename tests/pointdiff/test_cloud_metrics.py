import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from pointdiff import metrics
from pointdiff.assignment import assign
from shared.domains import Invalid


def random_clouds(n, m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(3, k, 3, dtype=torch.float64, generator=generator) for k in (n, m))


@pytest.mark.golden
def test_published_metrics(golden):
    want, _ = golden("09_pdr_metrics")
    sizes = {name.partition(".")[0] for name in want}
    assert len(sizes) == 3
    for size in sizes:
        pred, truth = (want[f"{size}.{name}"] for name in ("pred", "gt"))
        found = {
            "cd_t": metrics.chamfer(pred, truth),
            "cd_p": metrics.chamfer(pred, truth, "l1_half"),
            "f1_0.0001": metrics.f_score(pred, truth),
            "f1_0.001": metrics.f_score(pred, truth, 1e-3),
        }
        if f"{size}.emd_exact_l2_mean" in want and pred.shape[1] <= 512:
            found["emd_exact_l2_mean"] = metrics.earth_mover(pred, truth)
            found["emd_exact_sq_mean"] = metrics.earth_mover(pred, truth, squared=True)
        for name, value in found.items():
            torch.testing.assert_close(value, want[f"{size}.{name}"], rtol=1e-9, atol=1e-9)


def test_all_conventions_against_a_tree():
    a, b = random_clouds(90, 60)
    for i in range(3):
        to_b, to_a = cKDTree(b[i]).query(a[i])[0], cKDTree(a[i]).query(b[i])[0]
        l1, l2 = to_b.mean() + to_a.mean(), (to_b**2).mean() + (to_a**2).mean()
        wanted = {"l1": l1, "l1_half": l1 / 2, "l2": l2, "l2_half": l2 / 2}
        for form, value in wanted.items():
            assert metrics.chamfer(a, b, form)[i] == pytest.approx(value, rel=1e-12)
        assert metrics.hausdorff(a, b)[i] == pytest.approx(to_b.max(), rel=1e-12)
        near_b, near_a = (to_b < 0.1).mean(), (to_a < 0.1).mean()
        wanted = 2 * near_a * near_b / (near_a + near_b)
        assert metrics.f_score(a, b, 0.1, squared=False)[i] == pytest.approx(wanted)
        assert metrics.f_score(a, b, 0.01)[i] == pytest.approx(wanted)
    with pytest.raises(ValueError, match="choose l2, l2_half"):
        metrics.chamfer(a, b, "l3")


def test_density_aware_chamfer_by_hand():
    a = torch.tensor([[[0.0, 0, 0], [0.1, 0, 0], [1, 0, 0]]], dtype=torch.float64)
    b = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]], dtype=torch.float64)
    left = (1 - 1 / 2) + (1 - np.exp(-2 * 0.01) / 2) + 0
    found = metrics.density_aware_chamfer(a, b, alpha=2.0)
    assert float(found) == pytest.approx(left / 3 / 2, rel=1e-12)
    assert float(metrics.density_aware_chamfer(a, a)) == pytest.approx(0.0)


def test_gradients_are_right_and_finite_at_zero():
    a, b = (x[:1, :8].clone().requires_grad_() for x in random_clouds(8, 8))
    for form in metrics.FORMS:
        assert torch.autograd.gradcheck(lambda x, y, f=form: metrics.chamfer(x, y, f), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: metrics.density_aware_chamfer(x, y, 3.0), (a, b))
    assert torch.autograd.gradcheck(metrics.hausdorff, (a, b))
    metrics.chamfer(a, a.detach(), "l1").sum().backward()
    assert (a.grad == 0).all()


def test_earth_mover_in_blocks_comes_near_the_exact_one():
    for seed, spread in enumerate((1.0, 1.0, 0.05)):
        a, b = random_clouds(400, 400, seed)
        b = a + spread * (b - 0.5)
        exact = metrics.earth_mover(a, b)
        above = [float((metrics.earth_mover(a, b, n) / exact - 1).mean()) for n in (0, 4, 32)]
        assert 0.02 > above[2] >= -1e-12
        assert above[0] > above[1] >= above[2]
    with pytest.raises(ValueError, match="equal sizes, not 400 and 60"):
        metrics.earth_mover(a, b[:, :60])


def test_assignments_are_permutations():
    rng = np.random.default_rng(0)
    for n in (1, 40, 500):
        for a in (rng.random((n, 3)), np.zeros((n, 3))):
            b = rng.random((n, 3))
            for squared in (False, True):
                found = assign(a, b, 2, squared)
                assert sorted(found) == list(range(n))
                best = cdist(a, b, "sqeuclidean" if squared else "euclidean")
                least = best[linear_sum_assignment(best)].sum()
                share = best[np.arange(n), found].sum() / least
                assert share == pytest.approx(1.0) if n <= 128 else 1 <= share + 1e-9 < 1.1
    with pytest.raises(ValueError, match="sweeps=-1"):
        assign(a, b, -1)


def test_diversity_and_matching_by_hand():
    points = torch.tensor([[0.0, 0, 0]], dtype=torch.float64)
    samples = torch.stack([points, points + 1, points + 3])  # chamfer 2 * 3 * gap^2
    between = [6, 54, 24]
    assert metrics.total_mutual_difference(samples) == pytest.approx(sum(between) * 2 / 2)
    found = metrics.minimal_matching_distance(samples, samples[:1] + 4)
    assert found.tolist() == pytest.approx([6.0])
    with pytest.raises(ValueError, match="two completions or more, not 1"):
        metrics.total_mutual_difference(samples[:1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_is_never_a_number(bad):
    a, b = random_clouds(20, 20)
    for broken, other in ((a, b), (b, a)):
        broken = broken.clone()
        broken[0, 3, 1] = bad
        for x, y in ((broken, other), (other, broken)):
            for metric in (
                *(lambda p, q, f=form: metrics.chamfer(p, q, f) for form in metrics.FORMS),
                metrics.density_aware_chamfer,
                metrics.f_score,
                metrics.earth_mover,
                lambda p, q: metrics.hausdorff(p, q) + metrics.hausdorff(q, p),
            ):
                value = metric(x, y)
                assert value[0].isnan()
                assert value[1:].isfinite().all()


def test_evaluation_counts_what_is_not_usable():
    a, b = (x.float().numpy() for x in random_clouds(64, 64))
    items = [a[0], Invalid("1", "lost"), np.full((64, 3), np.nan, np.float32)]
    found = metrics.evaluate(items, list(b), threshold=1e-2)
    assert float(found["valid"]) == pytest.approx(1 / 3)
    assert {found[name].n for name in found if name != "valid"} == {1}
    exact = metrics.earth_mover(torch.tensor(a[:1]), torch.tensor(b[:1]))
    assert float(found["emd"]) == pytest.approx(float(exact), rel=0.02)
    assert "emd" not in metrics.evaluate([a[0][:50]], [b[0]])
    assert np.isnan(float(metrics.evaluate(items[1:], list(b[1:]))["f1"]))
    with pytest.raises(ValueError, match="3 clouds, 2 references"):
        metrics.evaluate(items, list(b[1:]))
