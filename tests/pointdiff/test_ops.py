import pytest
import torch

from pointdiff import accelerated, ops


@pytest.fixture
def clouds():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 70, 3, dtype=torch.float64, generator=generator)
    b = torch.randn(2, 50, 3, dtype=torch.float64, generator=generator)
    return a, b


@pytest.fixture(params=[1 << 20, 300], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", request.param)


@pytest.mark.golden
@pytest.mark.parametrize("ball", ["r0.2_k8", "r0.4_k16", "r1.6_k32"])
def test_published_ball_query(golden, block, ball):
    want, _ = golden("10_pdr_ops")
    radius, k = (float(part[1:]) for part in ball.split("_"))
    index, count = ops.ball_query(want["new_xyz"], want["xyz"], radius, int(k))
    assert torch.equal(index.int(), want[f"ball_query/{ball}/idx"])
    assert torch.equal(count.int(), want[f"ball_query/{ball}/count"])


@pytest.mark.golden
@pytest.mark.parametrize("n", [16, 48])
def test_published_farthest_points(golden, n):
    want, _ = golden("10_pdr_ops")
    found = ops.farthest_points(want["xyz"], n, skip_origin=True)
    assert torch.equal(found.int(), want[f"fps/{n}"])


@pytest.mark.golden
def test_published_interpolation(golden, block):
    want, _ = golden("10_pdr_ops")
    squared, index = ops.knn(want["new_xyz"], want["xyz"], 3)
    assert torch.equal(index.int(), want["three_nn/idx"])
    torch.testing.assert_close(squared.sqrt(), want["three_nn/dist"], rtol=1e-12, atol=1e-12)
    found = ops.interpolate(want["new_xyz"], want["xyz"], want["features"])
    torch.testing.assert_close(found, want["three_interpolate"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 50])
def test_neighbours_are_those_of_the_full_matrix(clouds, block, k):
    a, b = clouds
    full = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    squared, index = ops.knn(a, b, k)
    want = full.sort(-1).values[..., :k]
    torch.testing.assert_close(squared, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(full.gather(-1, index), want, rtol=1e-12, atol=1e-14)


def test_ball_query_by_hand(block):
    points = torch.tensor([[[0.0, 0, 0], [3, 0, 0], [1, 0, 0], [2, 0, 0], [0.5, 0, 0]]])
    query = torch.tensor([[[0.0, 0, 0], [9, 0, 0]]])
    index, count = ops.ball_query(query, points, 2.0, 4)  # a point at distance 2 is outside
    assert index.tolist() == [[[0, 2, 4, 0], [0, 0, 0, 0]]]
    assert count.tolist() == [[3, 0]]
    index, count = ops.ball_query(query, points, 5.0, 2)
    assert index[0, 0].tolist() == [0, 1]
    assert count[0, 0] == 2


def test_farthest_points_by_definition(clouds):
    points = clouds[0]
    chosen = ops.farthest_points(points, 20)
    full = ops.squared_distances(points, points)
    for row in range(2):
        for i in range(1, 20):
            gap = full[row][chosen[row, :i]].min(0).values
            assert gap[chosen[row, i]] == gap.max()


def test_the_kernel_rule_passes_over_points_near_the_origin():
    points = torch.tensor([[[1.0, 0, 0], [0.01, 0, 0], [0.9, 0, 0], [0.95, 0, 0]]])
    assert ops.farthest_points(points, 2).tolist() == [[0, 1]]
    assert ops.farthest_points(points, 2, skip_origin=True).tolist() == [[0, 2]]


def test_grouping_takes_columns(clouds):
    points = clouds[0]
    index = torch.randint(70, (2, 6, 4), generator=torch.Generator().manual_seed(1))
    rows, columns = ops.take(points, index), ops.group(points.transpose(1, 2), index)
    torch.testing.assert_close(rows.permute(0, 3, 1, 2), columns)
    torch.testing.assert_close(rows[1, 2, 3], points[1, index[1, 2, 3]])


def test_gradients_are_right(clouds):
    a, b = (x[:, :7].clone().requires_grad_() for x in clouds)
    features = torch.randn(
        2, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).requires_grad_()
    index = torch.tensor([[[0, 3], [3, 6]]] * 2)
    assert torch.autograd.gradcheck(lambda x, y: ops.knn(x, y, 3)[0], (a, b))
    assert torch.autograd.gradcheck(ops.interpolate, (a, b, features))
    assert torch.autograd.gradcheck(lambda x: ops.group(x, index), (features,))


def test_a_query_on_a_point_takes_its_features_and_has_a_finite_slope(clouds):
    points = clouds[1].clone().requires_grad_()
    features = points.detach().transpose(1, 2)
    found = ops.interpolate(points, points.detach(), features)
    torch.testing.assert_close(found, features, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert points.grad.isfinite().all()


def test_impossible_numbers_are_refused(clouds):
    with pytest.raises(ValueError, match="k=51 neighbours of 50"):
        ops.knn(*clouds, 51)
    with pytest.raises(ValueError, match="71 of 70"):
        ops.farthest_points(clouds[0], 71)


def test_nothing_has_no_neighbours(clouds):
    a, b = clouds[:2]
    for query, points in ((a[:0], b[:0]), (a[:, :0], b)):
        assert [x.shape for x in ops.knn(query, points, 2)] == [(*query.shape[:2], 2)] * 2
        assert [len(x) for x in ops.ball_query(query, points, 0.5, 2)] == [len(query)] * 2


def test_blocks_are_small(clouds, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 500)
    shapes = [d.shape for _, d in ops._blocks(*clouds)]
    assert max(shape.numel() for shape in shapes) <= 500
    assert sum(shape[1] for shape in shapes) == 70


@pytest.mark.skipif(accelerated.library() is None, reason="needs pytorch3d")
def test_pytorch3d_finds_the_same(clouds):
    a, b = (x.float() for x in clouds)
    assert torch.equal(accelerated.knn(a, b, 4), ops.knn(a, b, 4)[1])
    for mine, other in zip(
        ops.ball_query(a, b, 0.8, 5), accelerated.ball_query(a, b, 0.8, 5), strict=True
    ):
        assert torch.equal(mine, other)
    assert torch.equal(accelerated.farthest_points(a, 9), ops.farthest_points(a, 9))
