import torch

from pointdiff.merging import merge


def plane(n, seed):
    flat = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([flat, torch.zeros(n, 1)], 1)


def test_points_on_the_scan_give_way_to_it_and_others_stay():
    scan = plane(400, 0) * torch.tensor([0.5, 1, 1])  # the left half of a square
    generated = plane(300, 1)
    out = merge(generated, scan, reach=3.0)
    assert out.shape == (300, 3)
    from_scan = (out[:, None] == scan).all(2).any(1)
    from_model = (out[:, None] == generated).all(2).any(1)
    assert (from_scan ^ from_model).all()
    assert (out[from_model][:, 0] > 0.4).sum() > 100
    # the density stays: about half of the points on each half
    assert 130 < from_scan.sum() < 190
    assert len(torch.unique(out[from_scan], dim=0)) == from_scan.sum()
    assert (generated[generated[:, 0] > 0.6][:, None] == out).all(2).any(1).all()


def test_a_larger_reach_replaces_more():
    scan = plane(400, 0) * torch.tensor([0.5, 1, 1])
    generated = plane(300, 1)
    counts = [
        (merge(generated, scan, reach)[:, None] == scan).all(2).any(1).sum() for reach in (1, 3, 9)
    ]
    assert counts[0] < counts[1] < counts[2]


def test_scans_with_few_points_or_far_away():
    generated = plane(50, 1)
    torch.testing.assert_close(merge(generated, generated[:1]), generated)
    torch.testing.assert_close(merge(generated, plane(40, 2) + 9), generated)
    few = plane(4, 3)  # everything is near, but only four can be put in
    out = merge(generated, torch.cat([few, few]), reach=100.0)
    assert (out[:, None] == few).all(2).any(1).sum() == 4
    assert (out[4:, None] == generated).all(2).any(1).all()
