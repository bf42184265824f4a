"""Augmentation that the network is told of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shared.batches import Batches
from shared.images.augment import COLOUR, PIXELS, PLANE, Augmentation, recoloured, resampled
from shared.images.backbones.models import unet, uvit
from shared.images.domain import Images
from shared.images.networks import image_denoiser
from shared.process import Process
from shared.schedules import VPCosine

NAMES = [*PIXELS, *PLANE, *COLOUR]
SIDE = 16
SQUARE = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
ALL = dict.fromkeys(NAMES, True)
NONE = dict.fromkeys(NAMES, False)


def smooth(size=SIDE):
    """A blob off the centre, which interpolation hardly changes."""
    y, x = torch.meshgrid(*[torch.arange(size) - size / 2 + 0.5] * 2, indexing="ij")
    return torch.exp(-((x - 2.0) ** 2 + (y + 1.0) ** 2) / 8.0)[None].expand(3, -1, -1)


def drawn(augmentation, image, seed):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return augmentation(image)


def test_nothing_happens_with_probability_zero():
    augmentation = Augmentation(0.0, **{**ALL, "x_flip": False})
    for seed in range(20):
        image, labels = drawn(augmentation, SQUARE, seed)
        assert torch.equal(image, SQUARE)
        assert torch.count_nonzero(labels) == 0


@pytest.mark.parametrize("name", NAMES)
def test_an_image_with_zero_labels_is_untouched_and_others_are_not(name):
    """What makes it non-leaking: zero labels, which samples are made with, mean real images."""
    augmentation = Augmentation(0.5, **{**NONE, name: True})
    found = [drawn(augmentation, SQUARE, seed) for seed in range(40)]
    zero = [not labels.any() for _, labels in found]
    same = [torch.equal(image, SQUARE) for image, _ in found]
    assert zero == same
    assert 0 < sum(zero) < 40
    assert all(len(labels) == augmentation.entries for _, labels in found)


def test_labels_tell_what_was_done_to_whole_pixels():
    augmentation = Augmentation(1.0, **{**NONE, "x_flip": True, "y_flip": True})
    seen = set()
    for seed in range(20):
        image, (x, y) = drawn(augmentation, SQUARE, seed)
        axes = [axis for axis, label in ((2, x), (1, y)) if label]
        assert torch.equal(image, SQUARE.flip(axes))
        seen.add((float(x), float(y)))
    assert len(seen) == 4
    augmentation = Augmentation(1.0, **{**NONE, "rotate_90": True})
    turns = {(0.0, 0.0): 0, (1.0, 0.0): 1, (1.0, 1.0): 2, (0.0, 1.0): 3}
    for seed in range(20):
        image, labels = drawn(augmentation, SQUARE, seed)
        assert torch.equal(image, SQUARE.rot90(turns[tuple(labels.tolist())], (1, 2)))
    augmentation = Augmentation(1.0, **{**NONE, "shift_pixels": True})
    image, (x, y) = drawn(augmentation, SQUARE, 1)
    x, y = round(float(x) * SIDE / 8), round(float(y) * SIDE / 8)
    assert (x, y) != (0, 0)
    moved = SQUARE.roll((y, x), (1, 2))[:, 2:-2, 2:-2]
    assert torch.equal(image[:, 2:-2, 2:-2], moved)


def centre(image):
    """Centre of mass (x, y) in pixels from the middle."""
    weight = image[0].double().clamp(min=0.0)
    place = torch.arange(image.shape[1]) - image.shape[1] / 2 + 0.5
    total = weight.sum()
    return float((weight.sum(0) * place).sum() / total), float(
        (weight.sum(1) * place).sum() / total
    )


def spread(image):
    (x0, y0), weight = centre(image), image[0].double().clamp(min=0.0)
    place = torch.arange(image.shape[1]) - image.shape[1] / 2 + 0.5
    square = (place - x0) ** 2 + (place[:, None] - y0) ** 2
    return math.sqrt(float((weight * square).sum() / weight.sum() / 2))


def seeds_with(augmentation, image, condition, wanted=4):
    found = []
    for seed in range(200):
        result, labels = drawn(augmentation, image, seed)
        if condition(labels):
            found.append((result, labels.tolist()))
        if len(found) == wanted:
            return found
    raise AssertionError("no such draw")


def test_labels_tell_the_geometry():
    blob = smooth(48)
    x0, y0 = centre(blob)
    one = {name: Augmentation(1.0, **{**NONE, name: True}) for name in PLANE}
    for image, (w,) in seeds_with(one["scale"], blob, lambda v: 0.3 < abs(v[0]) < 1.5):
        assert centre(image) == pytest.approx((x0 * 2 ** (0.2 * w), y0 * 2 ** (0.2 * w)), abs=0.02)
        assert spread(image) == pytest.approx(2.0 * 2 ** (0.2 * w), rel=0.03)
    for image, (cos, sin) in seeds_with(one["rotate"], blob, lambda v: v.any()):
        cos += 1.0
        assert cos**2 + sin**2 == pytest.approx(1.0)
        assert centre(image) == pytest.approx((cos * x0 + sin * y0, cos * y0 - sin * x0), abs=0.02)
        assert spread(image) == pytest.approx(2.0, rel=0.03)
    for image, (x, y) in seeds_with(one["shift"], blob, lambda v: 0 < v.abs().max() < 1.0):
        assert centre(image) == pytest.approx((x0 + 6.0 * x, y0 + 6.0 * y), abs=0.05)
    for image, (c, s) in seeds_with(one["stretch"], blob, lambda v: 0.3 < v.norm() < 1.5):
        w, angle = math.hypot(c, s), math.atan2(s, c)
        along = x0 * math.cos(angle) + y0 * math.sin(angle)
        x, y = centre(image)
        stretched = x * math.cos(angle) + y * math.sin(angle)
        factors = [2 ** (0.2 * w), 2 ** (-0.2 * w)]  # an angle and its opposite: w of either sign
        assert min(abs(stretched - along * f) for f in factors) < 0.02


def test_a_quarter_turn_of_the_plane_is_one_of_pixels():
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).double()
    found = resampled(SQUARE, quarter)
    turned = [torch.allclose(found, SQUARE.rot90(k, (1, 2)), atol=1e-4) for k in (1, 3)]
    assert sum(turned) == 1
    oblong = SQUARE[:, :8]
    assert resampled(oblong, torch.eye(3).double()) is oblong
    half = resampled(oblong, torch.diag(torch.tensor([-1.0, -1.0, 1.0]).double()))
    assert torch.allclose(half, oblong.flip(1, 2), atol=1e-4)


def test_a_turn_of_an_oblong_image_keeps_shapes():
    blob = smooth(48)[:, 8:40]
    angle = torch.tensor(0.5).double()
    c, s = angle.cos(), angle.sin()
    inverse = torch.eye(3).double()
    inverse[:2, :2] = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
    wide = torch.zeros(3, 48, 48)
    wide[:, 8:40] = resampled(blob, inverse)
    assert spread(wide) == pytest.approx(2.0, rel=0.03)


def test_colours():
    one = {name: Augmentation(1.0, **{**NONE, name: True}) for name in COLOUR}
    grey = SQUARE.mean(0)

    def first(name, seed=0):
        return drawn(one[name], SQUARE, seed)

    image, (w,) = first("brightness")
    assert torch.allclose(image, SQUARE + 0.2 * w, atol=1e-6)
    image, (w,) = first("contrast")
    assert torch.allclose(image, SQUARE * 2 ** (0.5 * w), atol=1e-5)
    image, labels = seeds_with(one["luma_flip"], SQUARE, lambda v: v.any(), 1)[0]
    assert torch.allclose(image, SQUARE - 2 * grey, atol=1e-6)
    assert labels == [1.0]
    image, (w,) = first("saturation")
    assert torch.allclose(image, grey + 2**w * (SQUARE - grey), atol=1e-4)
    image, (cos, sin) = first("hue")
    assert torch.allclose(image.mean(0), grey, atol=1e-5)
    assert torch.allclose((image - grey).norm(dim=0), (SQUARE - grey).norm(dim=0), atol=1e-5)
    assert float(((image - grey) * (SQUARE - grey)).sum()) == pytest.approx(
        float((cos + 1.0) * (SQUARE - grey).square().sum()), rel=1e-3
    )
    flat = SQUARE[:1]
    assert torch.allclose(drawn(one["hue"], flat, 0)[0], flat, atol=1e-5)
    assert drawn(one["brightness"], flat, 0)[0].shape == flat.shape
    assert recoloured(flat, torch.eye(4).double()) is flat


def test_how_often():
    augmentation = Augmentation()
    assert augmentation.entries == 9
    labels = torch.stack([drawn(augmentation, SQUARE, seed)[1] for seed in range(600)])
    share = (labels != 0).double().mean(0)
    assert 0.42 < share[0] < 0.58  # flips are not rare: they are half of the data
    assert 0.03 < share[1] < 0.10
    assert (share[[2, 3, 4, 7, 8]] - 0.12).abs().max() < 0.05


def test_settings_are_read_and_checked():
    assert Augmentation.of(None) is None
    assert Augmentation.of(0.2) == Augmentation(0.2)
    assert Augmentation.of({"p": 0.2, "hue": True}).entries == 11
    with pytest.raises(ValueError, match="p=2 is no probability"):
        Augmentation(2)
    with pytest.raises(ValueError, match="did you mean 'rotate'"):
        Images(augment={"rotat": True})
    with pytest.raises(ValueError, match="give a probability"):
        Images(augment="edm")
    with pytest.raises(ValueError, match="rotate_90 needs square"):
        Augmentation(rotate_90=True)(SQUARE[:, :8])
    with pytest.raises(ValueError, match="U-ViT takes no augmentation"):
        uvit(Images(augment=0.12), VPCosine())
    with pytest.raises(ValueError, match="neither upscale nor augment"):
        Images(augment=0.12, autoencoder="x")


# -- in training ------------------------------------------------------------------------------


def batch(domain, number, size=8, seed=3):
    process = Process.single(VPCosine())
    return Batches(domain, process, domain.datasets()[0], size, seed)[number].batch


def test_a_record_sees_the_same_transforms_whenever_it_is_read():
    domain = Images(augment=0.5)
    first, again = batch(domain, 2), batch(domain, 2)
    assert torch.equal(first.state["x"], again.state["x"])
    assert torch.equal(first.cond["augment"], again.cond["augment"])
    other = batch(domain, 2, seed=4)
    assert not torch.equal(first.cond["augment"], other.cond["augment"])
    plain = batch(Images(), 2)
    assert torch.equal(plain.cond["label"], first.cond["label"])
    untouched = ~first.cond["augment"].any(1)
    assert torch.equal(first.state["x"][untouched], plain.state["x"][untouched])
    assert "augment" not in domain.datasets()[1][0]


def test_a_restored_domain_gives_images_as_they_are():
    domain = Images(augment=0.5)
    domain.restore(domain.statistics())
    assert domain.augment_entries == 9
    assert "augment" not in domain.datasets()[0][0]


@pytest.mark.parametrize("kind", ["small", "published"])
def test_a_step_of_training_with_it(kind):
    domain = Images(augment=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if kind == "small":
            denoiser = image_denoiser(domain, VPCosine(), widths=(8, 16))
        else:
            denoiser = unet(
                domain, VPCosine(), width=8, multipliers=(1, 2), groups=4, blocks=1, dropout=0.0
            )
    found = batch(domain, 0)
    noise = {"x": torch.from_numpy(np.random.default_rng(0).standard_normal((8, 1, 8, 8))).float()}
    t = torch.full((8,), 0.5).double()
    optimizer = torch.optim.Adam(denoiser.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = denoiser.loss(found.state, noise, t, None, found.cond).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert denoiser.backbone.augment.weight.grad.abs().max() > 0
    with torch.no_grad():
        told = {**found.cond, "augment": torch.zeros_like(found.cond["augment"])}
        zero = denoiser.outputs(found.state, t, None, told)["x"]
        label = {"label": found.cond["label"]}
        assert torch.equal(zero, denoiser.outputs(found.state, t, None, label)["x"])
        seen = denoiser.outputs(found.state, t, None, found.cond)["x"]
        assert not torch.allclose(zero, seen)
