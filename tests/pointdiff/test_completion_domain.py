import numpy as np
import pytest
import torch

from pointdiff.clouds import Frame, placed
from pointdiff.data import Augmentation, Pairs, Shapes, load_shapes, save_views
from pointdiff.domain import Completion
from pointdiff.files import write_one
from pointdiff.models import latents, pdr
from pointdiff.ops import knn
from pointdiff.scanning import Scanner
from shared.domains import Invalid
from shared.guidance import ClassifierFree
from shared.randomness import Draws
from shared.schedules import VPCosine

BRANCH = {
    "points": (16, 8), "radii": (0.5, 1.0), "widths": (8, 8, 16), "decoder": (8, 8, 16),
    "neighbours": 4, "k": 4,
}  # fmt: skip
SMALL = {
    "noisy": BRANCH,
    "partial": BRANCH,
    "transfer": {
        "encoder": (8, 8), "decoder": (8, 8, 8), "encoder_radii": (0.5, 1.0),
        "decoder_radii": (0.5, 1.0, 2.0), "neighbours": 4,
    },
    "whole": ((4, 8, 8), (8, 16)),
    "time": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Ellipsoids: 12 to train, 4 to test; two of the former are copies."""
    x = np.random.default_rng(0).normal(size=(16, 400, 3))
    x *= np.random.default_rng(1).uniform(0.3, 1, (16, 1, 3)) / np.linalg.norm(
        x, axis=2, keepdims=True
    )
    path = tmp_path_factory.mktemp("shapes") / "shapes.npz"
    groups = np.arange(16)
    groups[1] = 0
    np.savez(
        path,
        points=np.rint(x * 10_000).astype(np.int16),
        scale=np.float32(1e-4),
        split=np.array([0] * 12 + [1] * 4, np.int8),
        duplicate_group=groups,
    )
    return path


@pytest.fixture
def domain(file):
    return Completion(str(file), points=64, scan=Scanner(points=32), validation=0.2, frame="data")


@pytest.fixture
def own(file):
    """The same in the frame of the scan."""
    return Completion(str(file), points=64, scan=Scanner(points=32), validation=0.2)


def test_parts_do_not_overlap_and_copies_stay_together(file):
    shapes = load_shapes(file)
    parts = {part: set(shapes.rows(part, 0.3)) for part in ("train", "valid", "test")}
    assert parts["test"] == {12, 13, 14, 15}
    assert sorted(set.union(*parts.values())) == list(range(16))
    assert sum(len(rows) for rows in parts.values()) == 16
    assert ({0, 1} <= parts["train"]) or ({0, 1} <= parts["valid"])


def test_a_batch_holds_points_of_the_shape_and_of_its_visible_part(domain):
    training, validation = domain.datasets()
    assert len(training) + len(validation) == 12
    batch = domain.collate([training[i] for i in range(3)])
    assert batch.state["x"].shape == (3, 64, 3)
    assert batch.cond["partial"].shape == (3, 32, 4)
    assert (batch.cond["partial"][..., 3] == 1).all()
    whole = torch.from_numpy(domain.shapes[int(training.rows[1])])
    for part in (batch.state["x"][1], batch.cond["partial"][1, :, :3]):
        assert knn(part[None], whole[None])[0].max() < 1e-8


def test_training_scans_vary_with_the_generator_and_validation_scans_do_not(domain):
    training, validation = domain.datasets()

    def read(dataset, seed):
        torch.manual_seed(seed)
        return dataset[0]

    for a, b in zip(read(training, 1), read(training, 1), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(read(training, 1).partial, read(training, 2).partial)
    for a, b in zip(read(validation, 1), read(validation, 2), strict=True):
        np.testing.assert_array_equal(a, b)


def test_augmentation_moves_both_alike(file):
    shapes, rows = load_shapes(file), np.arange(3)
    strong = Augmentation(scale=1.5, rotation=90, mirror=0.5, translation=0.3, turned=0.5)
    plain, changed = (
        Pairs(shapes, rows, 64, Scanner(points=32), None, augment) for augment in (None, strong)
    )
    torch.manual_seed(0)
    before = plain[0]
    torch.manual_seed(0)
    after = changed[0]
    together = [np.concatenate([p.complete, p.partial[:, :3]]) for p in (before, after)]
    design = np.concatenate([together[0], np.ones((96, 1))], 1)
    fit, residue, rank, _ = np.linalg.lstsq(design, together[1], rcond=None)
    assert rank == 4
    assert residue.max() < 1e-8
    gram = fit[:3] @ fit[:3].T  # a rotation or reflection times a factor
    np.testing.assert_allclose(gram, gram[0, 0] * np.eye(3), atol=1e-5)
    assert 1 / 1.5**2 <= gram[0, 0] <= 1.5**2
    assert abs(gram[0, 0] - 1) > 1e-3
    with pytest.raises(ValueError, match="scale >= 1"):
        Augmentation(scale=0.5)


def test_mirroring_adds_flagged_images(file):
    domain = Completion(str(file), points=64, scan=Scanner(points=32), mirror="z")
    partial = domain.collate([domain.datasets()[1][0]]).cond["partial"][0]
    real, image = partial[partial[:, 3] == 1], partial[partial[:, 3] == -1]
    assert (len(real), len(image)) == (32, 16)
    back = image[:, :3] * torch.tensor([1, 1, -1.0])
    assert knn(back[None], real[None, :, :3])[0].max() == 0


def test_templates_are_the_test_scans_or_those_of_a_file(domain, tmp_path):
    batch = domain.template(0, [1, 5, 2])
    torch.testing.assert_close(batch.cond["partial"][0], batch.cond["partial"][1])
    assert not torch.equal(batch.cond["partial"][0], batch.cond["partial"][2])
    again = domain.template(9, [2])
    torch.testing.assert_close(again.cond["partial"][0], batch.cond["partial"][2])
    scan = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    write_one(tmp_path / "scan.ply", scan)
    batch = domain.template(0, [0, 1], scan=str(tmp_path / "scan.ply"), points=80)
    assert batch.state["x"].shape == (2, 80, 3)
    assert batch.cond["partial"].shape == (2, 32, 4)
    assert np.isin(batch.cond["partial"][1, :, 0].numpy(), scan[:, 0]).all()
    write_one(tmp_path / "few.ply", scan[:3])
    for request, message in (
        ({"scan": str(tmp_path / "few.ply")}, "3 points, at least 16"),
        ({"scan": str(tmp_path / "none.ply")}, "no such file"),
        ({"points": 0}, "request.points=0: give a whole number from 1 to 500,000"),
        ({"points": 500_001}, "request.points=500001"),
        ({"points": True}, "request.points=True"),
        ({"point": 5}, "unknown key 'point'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            domain.template(0, [0], **request)


def test_the_first_completion_of_a_scan_starts_from_even_noise(domain, own, tmp_path):
    def evenness(batch):  # 0.01 for even noise of 64 points, 0.1 for independent noise
        return batch.noise["x"].mean(1).abs().mean(1)

    scan = own.shapes[2]
    several = domain.template(0, [0, 1, 2], scan=scan)
    assert (evenness(several) < 0.03).tolist() == [True, False, False]
    count = len(domain.test)
    assert (evenness(domain.template(0, [0, count - 1, count])) < 0.03).tolist() == [
        True, True, False,
    ]  # fmt: skip
    later = [0, 5, 1000]
    assert (evenness(domain.template(0, later, split="train")) < 0.03).all()
    one = domain.template(0, [2], scan=scan)
    assert torch.equal(one.noise["x"][0], several.noise["x"][2])
    drawn = Draws(0, [2]).normal("x", 0, one.state["x"])
    assert torch.equal(one.noise["x"], drawn)
    assert domain.template(0, [0], scan=scan, even=False).noise is None
    with pytest.raises(ValueError, match="request.even=1: give true or false"):
        domain.template(0, [0], even=1)


def test_by_default_all_is_in_the_frame_of_the_scan(own, domain):
    pair, plain = own.test[1], domain.test[1]
    scan = pair.partial[:, :3]
    np.testing.assert_allclose(scan.min(0), -scan.max(0), atol=1e-6)
    assert np.linalg.norm(scan, axis=1).max() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(pair.frame.leave(scan), plain.partial[:, :3], atol=1e-6)
    np.testing.assert_allclose(own.truth(1), plain.complete, atol=1e-6)


def test_finished_samples_return_to_the_scan_with_its_points(own):
    cloud = own.shapes[2] * 7 + 40
    batch = own.template(0, [0, 1], scan=cloud)
    other = own.template(0, [0, 1], scan=own.shapes[2] * 0.1, keep=False)
    torch.testing.assert_close(batch.cond["partial"], other.cond["partial"], atol=1e-4, rtol=0)
    state = {"x": torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0))}
    state["x"][1] = 5.0  # nowhere near the scan
    near, far = own.finish(state, batch)["x"]
    whole = torch.from_numpy(cloud)[None]
    distance = knn(near[None], whole)[0][0, :, 0]
    assert 0 < (distance < 1e-6).sum() < 64
    assert knn(far[None], whole)[0].min() > 1
    plain = own.finish(state, other)["x"][0]
    assert knn(plain[None], whole)[0].min() > 1e-6
    with pytest.raises(ValueError, match="request.keep=3"):
        own.template(0, [0], keep=3)


def test_views_that_were_found_before_change_nothing(own, file, tmp_path):
    save_views(tmp_path / "views.npz", own.shapes, own.scan)
    quick = Completion(
        str(file), points=64, scan=own.scan, validation=0.2, views=str(tmp_path / "views.npz")
    )
    for index in range(3):
        for a, b in zip(own.test[index][:2], quick.test[index][:2], strict=True):
            np.testing.assert_array_equal(a, b)
    other = Scanner(points=32, distance=2.0)
    with pytest.raises(ValueError, match="another scanner"):
        Completion(str(file), scan=other, views=str(tmp_path / "views.npz")).shapes  # noqa: B018
    with pytest.raises(ValueError, match="something else"):
        load_shapes(file).take_views(file, other)


def test_views_that_are_not_there_are_found_and_those_of_other_shapes_refused(own, file, tmp_path):
    path = tmp_path / "views.npz"
    save_views(path, own.shapes, own.scan)
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "visible": np.zeros_like(arrays["visible"])})
    options = {"points": 64, "scan": own.scan, "validation": 0.2, "views": str(path)}
    empty = Completion(str(file), **options)
    for index in range(3):
        np.testing.assert_array_equal(own.test[index].partial, empty.test[index].partial)
    turned = {**np.load(file), "points": np.load(file)["points"][::-1]}
    np.savez(tmp_path / "turned.npz", **turned)
    with pytest.raises(ValueError, match="made of other shapes"):
        Completion(str(tmp_path / "turned.npz"), **options).shapes  # noqa: B018
    np.savez(path, **{**arrays, "visible": arrays["visible"][:5]})
    with pytest.raises(ValueError, match="made of other shapes"):
        Completion(str(file), **options).shapes  # noqa: B018
    path.write_text("views")
    with pytest.raises(ValueError, match=r"views.npz: no .npz archive"):
        Completion(str(file), **options).shapes  # noqa: B018


def test_shapes_that_are_not_finite_are_named(file, tmp_path):
    points = np.load(file)["points"].astype(np.float32)
    points[3, 7, 1] = np.nan
    for broken, message in ((points, "shape 3 is not finite"), (points[:0], "no shapes")):
        np.savez(tmp_path / "broken.npz", points=broken)
        with pytest.raises(ValueError, match=message):
            load_shapes(tmp_path / "broken.npz")


def test_constants_travel(domain):
    fresh = Completion()
    fresh.restore(domain.statistics())
    assert fresh.statistics() == domain.statistics()
    assert (fresh.points, fresh.partial_points) == (64, 32)
    with pytest.raises(ValueError, match="of domain images"):
        fresh.restore({"domain": "images"})
    with pytest.raises(ValueError, match="domain.data is not set"):
        fresh.template(0, [0])


def test_truth_is_perfect_and_failures_are_counted(domain, tmp_path):
    truth = [domain.test[i].complete for i in (0, 1, 2, 3, 0)]
    found = domain.metrics(truth)
    assert float(found["chamfer_l2"]) == float(found["emd"]) == 0
    assert float(found["f1"]) == float(found["valid"]) == 1
    assert float(domain.metrics(truth[1:])["chamfer_l2"]) > 0
    state = {"x": torch.zeros(2, 64, 3)}
    state["x"][1, 5] = torch.nan
    good, bad = domain.decode(state, None)
    assert isinstance(bad, Invalid)
    assert domain.metrics([*truth, bad])["valid"].n == 6
    domain.write(tmp_path / "a.npy", truth[:2])
    domain.write(tmp_path / "a.npy", truth[2:])
    for a, b in zip(domain.read(tmp_path / "a.npy"), truth, strict=True):
        np.testing.assert_array_equal(a, b)
    page = domain.compare(truth)
    assert all(title in page for title in ("scan 4", "completion 4", "truth 4"))
    page = domain.compare([bad, *truth], [truth[0]])
    assert "truth 5" in page
    assert "completion 0" not in page
    assert "scan 1" not in page
    page = domain.view(truth)
    assert "cloud 4" in page
    assert "scatter3d" in page
    alone = Completion()
    assert set(alone.metrics(truth)) == {"valid"}
    assert "cloud 4" in alone.compare([bad, *truth])


def test_a_model_trains_and_keeps_the_features_of_a_scan(domain, monkeypatch):
    torch.manual_seed(0)
    denoiser = pdr(domain, VPCosine(), **SMALL)
    batch = domain.collate([domain.datasets()[0][i] for i in range(2)])
    noise = {"x": torch.randn(2, 64, 3)}
    times = torch.tensor([0.3, 0.8], dtype=torch.float64)
    loss = denoiser.loss(batch.state, noise, times, None, batch.cond)
    loss.mean().backward()
    assert all(p.grad is not None for p in denoiser.parameters())
    calls = []
    network = denoiser.backbone.network
    compute = network.condition
    monkeypatch.setattr(network, "condition", lambda p: calls.append(1) or compute(p))
    with torch.no_grad():
        first = denoiser(noise, 0.9, None, batch.cond)["x"].x0
        kept = denoiser(noise, 0.9, None, batch.cond)["x"].x0
        assert len(calls) == 1
        other = {"partial": batch.cond["partial"].flip(0)}
        assert not torch.equal(denoiser(noise, 0.9, None, other)["x"].x0, first)
        torch.testing.assert_close(kept, first)
        for p in denoiser.parameters():
            p.mul_(1.5)
        changed = denoiser(noise, 0.9, None, other)["x"].x0
    assert len(calls) == 3
    assert not torch.equal(changed, first)
    with pytest.raises(ValueError, match="condition 'partial'"):
        denoiser(noise, 0.5)


def test_guidance_without_the_condition_keeps_the_features_too(domain, monkeypatch):
    denoiser = pdr(domain, VPCosine(), **SMALL)
    batch = domain.collate([domain.datasets()[0][i] for i in range(2)])
    calls, network = [], denoiser.backbone.network
    compute = network.condition
    monkeypatch.setattr(network, "condition", lambda p: calls.append(len(p)) or compute(p))
    null = {"partial": torch.zeros_like(batch.cond["partial"][:1])}
    guided = ClassifierFree(denoiser, denoiser.process, null, 2.0)
    with torch.no_grad():
        for t in (0.9, 0.5, 0.1):
            guided({"x": torch.randn(2, 64, 3)}, t, None, batch.cond)
    assert calls == [4]


def test_classes_that_the_data_do_not_tell_are_refused(domain, file):
    alone = Completion(str(file), 64, Scanner(points=32), classes=True)
    with pytest.raises(ValueError, match="domain.classes=true: .* tells no classes"):
        _ = alone.class_names


def test_classes_are_told_where_they_are_known(file, tmp_path):
    with np.load(file) as arrays:
        labels = {"label": np.arange(16) % 3, "label_names": np.array(["ball", "egg", "disc"])}
        np.savez(tmp_path / "named.npz", **dict(arrays), **labels)
    data = str(tmp_path / "named.npz")
    assert "label" not in Completion(data, points=64).template(0, [0]).cond
    domain = Completion(data, points=64, scan=Scanner(points=32), classes=True, drop=0.1)
    assert domain.template(0, [0, 1]).cond["label"].tolist() == [0, 1]  # shapes 12 and 13
    scan = domain.shapes[3]
    for given, number in (("egg", 1), (2, 2), (None, 3)):
        cond = domain.template(0, [0], scan=scan, label=given).cond
        assert cond["label"].tolist() == [number]
    assert domain.template(0, [0], scan="none", label="disc").cond["label"].tolist() == [2]
    fresh = Completion()
    fresh.restore(domain.statistics())
    with pytest.raises(ValueError, match="request.label=cube: .* ball, egg, disc"):
        fresh.template(0, [0], scan=scan, label="cube")
    torch.manual_seed(0)
    size = {"points": 8, "width": 16, "heads": 2, "latents": 4, "blocks": 1, "tokens": 8}
    for denoiser in (pdr(domain, VPCosine(), **SMALL), latents(domain, VPCosine(), **size)):
        for p in denoiser.parameters():
            torch.nn.init.normal_(p, std=0.3)
        x = {"x": torch.randn(1, 64, 3)}
        with torch.no_grad():
            found = [
                denoiser(x, 0.5, None, domain.template(0, [0], scan=scan, label=name).cond)["x"].x0
                for name in ("egg", "disc")
            ]
        assert not torch.allclose(*found)


def test_clouds_too_small_for_the_model_are_refused(domain):
    with pytest.raises(ValueError, match="model.noisy.points: 100 points of a cloud with 64"):
        pdr(domain, VPCosine(), **SMALL | {"noisy": BRANCH | {"points": (100, 8)}})


def test_folders_are_brought_to_the_unit_frame(tmp_path):
    points = np.random.default_rng(0).normal(size=(50, 3)) * 9 + 100
    write_one(tmp_path / "a.ply", points)
    write_one(tmp_path / "b.xyz", points[:20])
    (tmp_path / "c.ply").write_bytes(b"ply")
    shapes = load_shapes(tmp_path)
    assert len(shapes) == 2
    np.testing.assert_allclose(np.linalg.norm(shapes[0], axis=1).max(), 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match="no usable shape"):
        load_shapes(tmp_path / "c.ply")
    with pytest.raises(ValueError, match="2 clouds, but other"):
        Shapes([points, points], split=np.zeros(1))


def test_the_shapes_of_the_project(data_folder):
    shapes = load_shapes(data_folder("shapes/shapes4096.npz"))
    assert len(shapes.rows("test", 0.05)) == 241
    assert len(shapes.rows("train", 0.05)) + len(shapes.rows("valid", 0.05)) == 1842
    assert np.linalg.norm(shapes[7], axis=1).max() == pytest.approx(1.0, abs=1e-3)


def test_a_domain_of_both_frames_trains_on_either_and_completes_in_the_one_asked_for(file):
    strong = Augmentation(rotation=90, stretch=1.3, turned=0.5)
    both = Completion(
        str(file),
        points=400,
        scan=Scanner(points=32),
        validation=0.2,
        augment=strong,
        frame="both",
    )
    torch.manual_seed(0)
    pairs = [both.datasets()[0][i % 9] for i in range(40)]
    complete = [Frame.of(pair.complete) for pair in pairs]
    seen = [Frame.of(pair.partial[:, :3]) for pair in pairs]
    fits = [
        [np.abs([*f.centre, f.scale - 1]).max() < 1e-5 for f in frames]
        for frames in (complete, seen)
    ]
    assert np.logical_xor(*fits).all()
    assert 10 < sum(fits[0]) < 30

    scan = both.shapes[0][:150] + np.float32(0.1)
    conditions = {
        frame: both.template(0, [0], scan=scan, frame=frame).cond["partial"][0, :, :3]
        for frame in ("scan", "data")
    }
    assert np.isin(conditions["data"], scan).all()
    assert not np.isin(conditions["scan"], scan).all()
    default = both.template(0, [0], scan=scan).cond["partial"][0, :, :3]
    torch.testing.assert_close(default, conditions["scan"])
    truths = [both.template(0, [1], frame=f).cond for f in ("scan", "data")]
    np.testing.assert_allclose(truths[1]["frame"], [[0, 0, 0, 1]])
    back = truths[0]["partial"][0, :, :3] * truths[0]["frame"][0, 3] + truths[0]["frame"][0, :3]
    torch.testing.assert_close(back, truths[1]["partial"][0, :, :3].double(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="the model knows scan and data"):
        both.template(0, [0], frame="both")


@pytest.mark.parametrize("axis", range(3))
def test_a_part_of_a_normalised_cloud_is_told_from_scans_that_lie_anywhere(axis):
    x = np.random.default_rng(axis).normal(size=(500, 3))
    whole = Frame.of(x).enter(x)
    part = whole[whole[:, axis] > -0.1]
    part = np.concatenate([part, whole[[np.linalg.norm(whole, axis=1).argmax()]]])
    assert placed(part)
    centred = part - part.mean(0)
    for other in (
        3 * part, part + 5, part * 0.9, Frame.of(part).enter(part),
        centred / np.linalg.norm(centred, axis=1).max(),
    ):  # fmt: skip
        assert not placed(other)
