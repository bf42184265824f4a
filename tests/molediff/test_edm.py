"""EDM's tables, losses, likelihood and sampler against published outputs."""

import math

import pytest
import torch

from molediff.geometric.convert import edm_options, edm_weights
from molediff.geometric.edm import (
    AtomDecoder,
    EDMSampler,
    edm_heads,
    l2_loss,
    log_volume,
)
from molediff.geometric.egnn import EGNN
from molediff.geometric.process import molecule_process
from shared.denoisers import Denoiser, TimeCode
from shared.likelihood import prior_kl, step_kl
from shared.schedules import Polynomial, VPDiscrete
from shared.solvers.ancestral import DDPM


class Published:
    """A golden item in this library's words."""

    def __init__(self, tensors, info):
        self.tensors, self.info = tensors, info
        dynamics, diffusion = info["dynamics"], info["diffusion"]
        self.steps = diffusion["timesteps"]
        self.features = dynamics["in_node_nf"] - 1
        self.charges = self.features > 5
        nx, nc, ni = diffusion["norm_values"]
        self.position_scale, self.scales = 1 / nx, {"types": 1 / nc, "charges": 1 / ni}
        state = {k[6:]: v for k, v in tensors.items() if k.startswith("state.")}
        names = {"types": 5} | ({"charges": 1} if self.charges else {})
        net = EGNN(names, context=dynamics["context_node_nf"], options=edm_options(state))
        net.load_state_dict(edm_weights(state, self.features))
        schedule = Polynomial(steps=self.steps, precision=diffusion["noise_precision"])
        self.denoiser = Denoiser(
            net.double(),
            molecule_process(schedule, charges=self.charges),
            edm_heads(5, charges=self.charges),
            TimeCode("time"),
        )
        self.mask = tensors["in.node_mask"][..., 0].bool()
        context = tensors.get("in.context")
        self.cond = None if context is None else {"context": context[:, 0]}

    def split(self, xh):
        parts = xh.split([3, 5, 1] if self.charges else [3, 5], -1)
        return dict(zip(["positions", "types", "charges"], parts, strict=False))

    def join(self, state):
        return torch.cat([state[n] for n in ("positions", "types", "charges") if n in state], -1)

    def denoise(self, x, t):
        return self.denoiser(x, t, self.mask, self.cond)


@pytest.fixture(params=["02_edm_process_qm9", "02_edm_process_qm9_cond"])
def item(request, golden):
    return Published(*golden(request.param))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["polynomial_2", "cosine"])
def test_tables(golden, name):
    tensors, _ = golden("02_edm_gamma_tables")
    table = {k.split(".")[1]: v for k, v in tensors.items() if k.startswith(name)}
    schedule = VPDiscrete.edm_cosine() if name == "cosine" else Polynomial()
    t = torch.arange(1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(-2 * schedule.log_snr(t), table["gamma"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.alpha(t) ** 2, table["alpha2"], rtol=1e-9, atol=0)


@pytest.mark.golden
def test_reverse_steps(item):
    checked = 0
    for key in [k for k in item.tensors if k.endswith(".zs")]:
        s = int(key.split(".")[0].removeprefix("step_s"))
        get = {k: item.tensors[f"step_s{s}.{k}"] for k in ("zt", "eps", "zs", "eps_hat")}
        x, noise = item.split(get["zt"]), item.split(get["eps"])
        times = [(s + 1) / item.steps, s / item.steps]
        seen = item.denoise(x, times[0])
        eps = item.join({n: p.eps for n, p in seen.items()})
        torch.testing.assert_close(eps, get["eps_hat"], rtol=1e-8, atol=1e-8)

        def project(name, value):
            return item.denoiser.process.fields[name].geometry.project(value, item.mask)

        def draw(name, number, noise=noise):
            return noise[name]

        out = DDPM().solve(item.denoiser.process, item.denoise, x, times, draw, project)
        torch.testing.assert_close(item.join(out), get["zs"], rtol=1e-8, atol=1e-8)
        checked += 1
    assert checked >= 3


@pytest.mark.golden
def test_l2_loss_and_its_gradient(item):
    x0, eps = item.split(item.tensors["norm.xh"]), item.split(item.tensors["l2.eps"])
    step = item.tensors["l2.t_int"][:, 0]
    loss = l2_loss(
        item.denoiser, x0, eps, step, item.mask, item.cond, steps=item.steps, scales=item.scales
    )
    torch.testing.assert_close(loss, item.tensors["l2.loss_per_sample"], rtol=1e-8, atol=1e-10)
    loss.mean().backward()
    norm = torch.stack([p.grad.norm() for p in item.denoiser.parameters()]).norm()
    torch.testing.assert_close(norm, item.tensors["l2.grad_norm_of_mean_loss"], rtol=1e-8, atol=0)


@pytest.mark.golden
def test_likelihood_terms(item):
    get = item.tensors
    x0, process = item.split(get["norm.xh"]), item.denoiser.process
    torch.testing.assert_close(
        prior_kl(process, x0, item.mask), get["kl_prior"], rtol=1e-7, atol=1e-12
    )
    t = get["nll.t_int"][:, 0].double() / item.steps
    s = (get["nll.t_int"][:, 0] - 1).double() / item.steps
    eps = item.split(get["nll.eps"])
    diffusion = item.steps * step_kl(process, item.denoiser, x0, t, s, eps, item.mask, item.cond)
    torch.testing.assert_close(diffusion, get["nll.term_diffusion"], rtol=1e-8, atol=1e-8)
    z0 = process.perturb(x0, 0.0, item.split(get["nll.eps0"]))
    torch.testing.assert_close(item.join(z0), get["nll.z0"], rtol=1e-10, atol=1e-10)
    seen = item.denoise(z0, 0.0)
    bare = AtomDecoder(item.scales, constants=False)(x0, seen, item.mask)
    torch.testing.assert_close(
        bare, get["nll.log_pxh_given_z0_without_constants"], rtol=1e-8, atol=1e-8
    )
    log_p = AtomDecoder(item.scales)(x0, seen, item.mask)
    torch.testing.assert_close(
        log_p - bare, get["log_constants_p_x_given_z0"], rtol=1e-9, atol=1e-9
    )
    volume = log_volume(x0["positions"], item.mask, item.position_scale)
    torch.testing.assert_close(volume, get["norm.delta_log_px"], rtol=1e-12, atol=1e-12)
    total = prior_kl(process, x0, item.mask) + diffusion - log_p - volume
    torch.testing.assert_close(total, get["nll.neg_log_pxh"], rtol=1e-8, atol=1e-8)


@pytest.mark.golden
def test_last_step(golden):
    item = Published(*golden("02_edm_process_qm9"))
    z0, eps = item.split(item.tensors["final.z0"]), item.split(item.tensors["final.eps"])
    seen = item.denoise(z0, 0.0)["positions"]
    x = seen.x0 + seen.sigma / seen.alpha * eps["positions"]
    wanted = item.tensors["final.x"] * item.position_scale
    torch.testing.assert_close(x, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.golden
def test_full_chain(golden):
    item = Published(*golden("02_edm_full_chain_T25"))
    process, noise = item.denoiser.process, item.tensors["in.noise"]
    draws = [process.noise(item.split(z), item.mask) for z in noise]
    states = []

    def after(state, time):
        states.append(item.join(state))
        return state

    def project(name, value):
        return process.fields[name].geometry.project(value, item.mask)

    out = EDMSampler().solve(
        process,
        item.denoise,
        process.prior(draws[0]),
        [i / item.steps for i in range(item.steps, -1, -1)],
        lambda name, j: draws[1 + j][name],
        project,
        after,
    )
    for ours, theirs in zip(states, item.tensors["out.z"], strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out["positions"], item.tensors["out.x"], rtol=1e-6, atol=1e-6)
    types = out["types"].argmax(-1)
    assert torch.equal(types[item.mask], item.tensors["out.one_hot"].argmax(-1)[item.mask])
    charges = (out["charges"] / item.scales["charges"]).round() * item.mask[..., None]
    assert torch.equal(charges, item.tensors["out.charges"])


# -- without published outputs ----------------------------------------------------------------


class Perfect:
    """Knows the molecule."""

    def __init__(self, process, x0):
        self.process, self.x0 = process, x0

    def __call__(self, x, t, mask=None, cond=None):
        from shared.predictions import Prediction

        schedule = self.process.lead
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        return {n: Prediction(x[n], alpha, sigma, x0=self.x0[n]) for n in x}


def test_every_type_can_be_generated_without_charges():
    """The published code cut the last type off where there are no charges."""
    process = molecule_process()
    gen = torch.Generator().manual_seed(0)
    types = torch.eye(5, dtype=torch.float64)[None] * 0.125
    x = torch.randn(1, 5, 3, generator=gen, dtype=torch.float64)
    x0 = {"positions": x - x.mean(1, keepdim=True), "types": types}
    prior = process.noise({k: torch.randn_like(v) for k, v in x0.items()})
    for from_network in (False, True):
        out = EDMSampler(from_network).solve(
            process,
            Perfect(process, x0),
            prior,
            [i / 50 for i in range(50, -1, -1)],
            lambda n, j: process.noise({n: torch.randn(x0[n].shape, generator=gen).double()})[n],
            lambda n, v: process.fields[n].geometry.project(v),
        )
        assert out["types"].argmax(-1)[0].tolist() == [0, 1, 2, 3, 4]
        assert (out["positions"] - x0["positions"]).abs().max() < 0.02
    assert EDMSampler().intervals(101) == 100


def test_decoder_is_a_distribution_over_types():
    """Over all classes of one atom the probabilities sum to one."""
    process = molecule_process()
    z = {"positions": torch.zeros(1, 1, 3).double(), "types": torch.tensor([[[0.2, 0.1, 0.0]]])}
    z["types"] = z["types"].double()
    total = 0.0
    for k in range(3):
        types = torch.zeros(1, 1, 3, dtype=torch.float64)
        types[..., k] = 0.25
        x0 = {"positions": z["positions"], "types": types}
        seen = Perfect(process, x0)(z, 0.5)
        total += math.exp(float(AtomDecoder().atoms("types", types, seen["types"], None)))
    assert total == pytest.approx(1.0, abs=1e-6)
