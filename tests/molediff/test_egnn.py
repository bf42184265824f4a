"""EGNN against published outputs, and its own promises: equivariance, padding, blocks."""

import pytest
import torch

from molediff.geometric import egnn
from molediff.geometric.convert import edm_options, edm_weights, invariant_weights
from molediff.geometric.egnn import EGNN, EGNNOptions, InvariantEGNN


def load_edm(tensors, info, dtype=torch.float64, **settings):
    config = info.get("config") or info["dynamics"]
    state = {k[6:]: v for k, v in tensors.items() if k.startswith("state.")}
    features = config["in_node_nf"] - 1
    names = {"types": 5} | ({"charges": features - 5} if features > 5 else {})
    options = edm_options(
        state,
        tanh=config["tanh"],
        norm_constant=config["norm_constant"],
        aggregation=config["aggregation_method"],
        normalization_factor=config["normalization_factor"],
        **settings,
    )
    net = EGNN(names, context=config["context_node_nf"], options=options)
    net.load_state_dict(edm_weights(state, features))
    return net.to(dtype)


def fields(net, xh):
    return dict(
        zip(["positions", *net.features], xh.split([3, *net.features.values()], -1), strict=True)
    )


def run(net, xh, t, mask, context=None):
    cond = None if context is None else {"context": context}
    return torch.cat(list(net(fields(net, xh), t, mask, cond).values()), -1)


@pytest.fixture(params=["01_egnn_nf32_l3_qm9_charges", "01_egnn_nf64_l9_qm9_cond"])
def published(request, golden):
    tensors, info = golden(request.param)
    context = tensors["in.context"].amax(1) if "in.context" in tensors else None
    if context is not None:  # padded rows are zero: take the first atom's
        context = tensors["in.context"][:, 0]
    mask = tensors["in.node_mask"][..., 0].bool()
    return tensors, info, mask, context


@pytest.mark.golden
@pytest.mark.parametrize("grad", [True, False])
def test_outputs_are_the_published_ones(published, grad):
    tensors, info, mask, context = published
    net = load_edm(tensors, info)
    with torch.set_grad_enabled(grad):
        out = run(net, tensors["in.xh"], tensors["in.t"][:, 0], mask, context)
        quarter = run(
            net, tensors["in.xh"], torch.full((len(mask),), 0.25).double(), mask, context
        )
    torch.testing.assert_close(out, tensors["out.eps_hat"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(quarter, tensors["out.eps_hat_t_scalar_0.25"], rtol=1e-9, atol=1e-9)


@pytest.mark.golden
def test_float32_stays_as_close_as_the_published_code(published):
    tensors, info, mask, context = published
    net = load_edm(tensors, info, torch.float32)
    context = None if context is None else context.float()
    out = run(net, tensors["in.xh"].float(), tensors["in.t"][:, 0].float(), mask, context)
    error = (out.double() - tensors["out.eps_hat"]).abs().max()
    assert error < 10 * info["f32_vs_f64_maxabs"]


@pytest.mark.golden
def test_gradients_are_the_published_ones(published):
    tensors, info, mask, context = published
    net = load_edm(tensors, info)
    xh = tensors["in.xh"].clone().requires_grad_()
    out = run(net, xh, tensors["in.t"][:, 0], mask, context)
    (tensors["grad.w"] * tensors["in.node_mask"] * out).sum().backward()
    torch.testing.assert_close(
        xh.grad, tensors["grad.d_sum(w*mask*out)_d_xh"], rtol=1e-9, atol=1e-9
    )
    gradients = {k[6:]: v for k, v in tensors.items() if k.startswith("gradp.")}
    features = sum(net.features.values())
    wanted = edm_weights(gradients, features)
    ours = dict(net.named_parameters())
    assert len(wanted) == len(gradients) > 0
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name].grad, gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.golden
def test_property_classifier(golden):
    tensors, info = golden("11_edm_classifier")
    state = {k[6:]: v for k, v in tensors.items() if k.startswith("state.")}
    config = info["config"]
    options = EGNNOptions(width=config["hidden_nf"], layers=config["n_layers"])
    net = InvariantEGNN({"types": 5}, options=options)
    net.load_state_dict(invariant_weights(state))
    inputs = {"positions": tensors["in.x"], "types": tensors["in.one_hot"]}
    out = net.double()(inputs, mask=tensors["in.node_mask"].bool())
    torch.testing.assert_close(out[:, 0], tensors["out.prediction"], rtol=1e-9, atol=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("step", [0, 120, 600, 999])
def test_energy_network_and_its_projected_gradient(golden, step):
    tensors, info = golden("03_eegsde_single")
    state = {k: v for k, v in tensors.items() if k.startswith("energy1.")}
    config = info["energy_net"]
    options = EGNNOptions(width=config["hidden_nf"], layers=config["n_layers"])
    net = InvariantEGNN({"types": 5}, timed=True, repeated=True, options=options)
    net.load_state_dict(invariant_weights(state))
    net.double()
    z = tensors[f"step_s{step}.zt"].clone().requires_grad_()
    mask = tensors["in.node_mask"][..., 0].bool() if "in.node_mask" in tensors else _mask(info)
    time = torch.full((len(z),), (step + 1) / 1000, dtype=torch.float64)
    inputs = {"positions": z[..., :3], "types": z[..., 3:]}
    prediction = net(inputs, time, mask)[:, 0]
    torch.testing.assert_close(
        prediction, tensors[f"step_s{step}.prediction1"], rtol=1e-8, atol=1e-10
    )
    target = tensors["in.context"][:, 0, 0]
    (prediction - target).square().sum().backward()
    gradient = z.grad
    n = mask.sum(1)[:, None, None]
    x = gradient[..., :3] * mask[..., None]
    x = (x - x.sum(1, keepdim=True) / n) * mask[..., None]
    projected = torch.cat([x, gradient[..., 3:] * mask[..., None]], -1)
    torch.testing.assert_close(
        projected, tensors[f"step_s{step}.grad_projected1"], rtol=1e-8, atol=1e-10
    )


def _mask(info):
    sizes = torch.tensor(info["n_atoms"])
    return torch.arange(int(sizes.max())) < sizes[:, None]


# -- own promises -----------------------------------------------------------------------------


def small(dtype=torch.float64, layers=3, width=16, **settings):
    gen = torch.Generator().manual_seed(0)
    net = EGNN({"types": 5}, options=EGNNOptions(width=width, layers=layers, **settings))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn(p.shape, generator=gen) / max(1, p.shape[-1]) ** 0.5)
            if name.endswith("length.weight"):
                p.mul_(0.05)
    return net.to(dtype)


def batch(dtype=torch.float64, sizes=(7, 4, 1, 6), seed=1):
    gen = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    xh = torch.randn(len(sizes), max(sizes), 8, generator=gen, dtype=torch.float64)
    xh = xh * mask[..., None]
    t = torch.rand(len(sizes), generator=gen, dtype=torch.float64)
    return xh.to(dtype), t.to(dtype), mask


OPTIONS = [
    {},
    {"attention": False},
    {"tanh": False},
    {"sublayers": 2},
    {"sin_embedding": True},
    {"aggregation": "mean"},
    {"normalization_factor": 4.0, "norm_constant": 0.0},
]


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_blocks_change_nothing(settings, monkeypatch):
    net = small(**settings)
    xh, t, mask = batch()
    with_grad = run(net, xh, t, mask).detach()
    for size in (1, 16 * 8 * 7 * 3, 2**30):  # single atoms, three atoms, everything
        monkeypatch.setattr(egnn, "BLOCK_BYTES", size)
        with torch.no_grad():
            torch.testing.assert_close(run(net, xh, t, mask), with_grad, rtol=1e-10, atol=1e-10)


def test_every_option_matters():
    xh, t, mask = batch()
    seen = []
    for settings in OPTIONS:
        out = run(small(**settings), xh, t, mask)
        assert all((out - other).abs().max() > 1e-3 for other in seen)
        seen.append(out)


def test_bf16_products_stay_close():
    xh, t, mask = batch(torch.float32)
    exact = run(small(torch.float32), xh, t, mask)
    rough = run(small(torch.float32, matmul_dtype=torch.bfloat16), xh, t, mask)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() < 0.1 * exact.norm()


def test_context_is_needed_and_used():
    net = EGNN({"types": 5}, context=2, options=EGNNOptions(width=8, layers=1)).double()
    xh, t, mask = batch()
    with pytest.raises(ValueError, match="cond\\['context'\\]"):
        run(net, xh, t, mask)
    with pytest.raises(ValueError, match="expected \\[batch, 2\\]"):
        run(net, xh, t, mask, torch.zeros(4, 3).double())
    one = run(net, xh, t, mask, torch.zeros(4, 2).double())
    assert (one - run(net, xh, t, mask, torch.ones(4, 2).double())).abs().max() > 1e-4


def test_time_code_of_invariant_network():
    with_time = InvariantEGNN({"types": 5}, timed=True, options=EGNNOptions(width=8, layers=1))
    xh, _, mask = batch(torch.float32)
    inputs = {"positions": xh[..., :3], "types": xh[..., 3:]}
    with pytest.raises(ValueError, match="time"):
        with_time(inputs, None, mask)
    assert with_time(inputs, torch.ones(4), mask).shape == (4, 1)


def test_options_are_checked():
    with pytest.raises(ValueError, match="median"):
        EGNNOptions(aggregation="median")
    with pytest.raises(ValueError, match="positive"):
        EGNNOptions(layers=0)


def test_foreign_keys_are_refused():
    with pytest.raises(ValueError, match=r"egnn\."):
        edm_weights({"conv.weight": torch.zeros(1)}, 5)
    with pytest.raises(ValueError, match="not a weight"):
        edm_weights({"egnn.e_block_0.gcl_0.odd.0.weight": torch.zeros(1)}, 5)
