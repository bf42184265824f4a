"""The transformer's own promises; equivariance is in test_equivariance.py."""

import pytest
import torch

from molediff.geometric.process import fast_times, karras_heads, molecule_process
from molediff.geometric.transformer import EquivariantTransformer
from shared.denoisers import Denoiser

SMALL = {"width": 32, "layers": 2, "heads": 4, "vectors": 8, "pairs": 16}


def molecules(dtype=torch.float32, n=6):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(4, n, 3, generator=gen, dtype=torch.float64)
    types = torch.randint(5, (4, n), generator=gen)
    types = 0.25 * torch.nn.functional.one_hot(types, 5)
    return {"positions": (x - x.mean(1, keepdim=True)).to(dtype), "types": types.to(dtype)}


def randomised(net, seed=0):
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=gen))
    return net


def test_untrained_network_predicts_nothing_but_what_preconditioning_knows():
    """Zero outputs: x0_hat is the best linear guess, types follow Bayes' rule."""
    model = Denoiser(
        EquivariantTransformer({"types": 5}, **SMALL), molecule_process(), karras_heads(5)
    )
    x = molecules()
    seen = model(x, 0.02)
    alpha, sigma = seen["positions"].alpha, seen["positions"].sigma
    shrunk = alpha * 1.398**2 / ((alpha * 1.398) ** 2 + sigma**2)
    torch.testing.assert_close(seen["positions"].x0, shrunk * x["positions"])
    assert torch.equal(seen["types"].x0.argmax(-1), x["types"].argmax(-1))
    guess = model(x, 1.0)["types"].x0
    torch.testing.assert_close(guess, torch.full_like(guess, 0.05), atol=2e-3, rtol=0)


def test_a_few_steps_learn():
    """Four noisy molecules are learnt by heart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = EquivariantTransformer({"types": 5}, angstrom=1.398, **SMALL)
    model = Denoiser(net, molecule_process(), karras_heads(5), times=fast_times())
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x0, gen = molecules(), torch.Generator().manual_seed(1)
    noise = model.process.noise({k: torch.randn(v.shape, generator=gen) for k, v in x0.items()})
    times = model.times(model.process.lead, 4, gen)
    losses = []
    for _ in range(40):
        loss = model.loss(x0, noise, times).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_free_properties_are_nan():
    net = randomised(EquivariantTransformer({"types": 5}, context=2, **SMALL))
    x, code = molecules(), torch.zeros(4)
    value = torch.tensor([[1.0, 2.0]] * 4)
    free = torch.full((4, 2), torch.nan)
    half = torch.tensor([[1.0, torch.nan]] * 4)
    outs = [net(x, code, None, {"context": c})["types"] for c in (value, free, half)]
    assert all(out.isfinite().all() for out in outs)
    torch.testing.assert_close(net(x, code)["types"], outs[1])  # no condition = nothing given
    zero = net(x, code, None, {"context": torch.zeros(4, 2)})["types"]
    for i, a in enumerate([*outs, zero]):  # a value of zero is not an absent one
        assert all((a - b).abs().max() > 1e-4 for b in [*outs, zero][:i])
    with pytest.raises(ValueError, match="2 properties"):
        net(x, code, None, {"context": torch.zeros(4, 3)})


def test_bf16_pairs_stay_close_and_positions_float32():
    x, code = molecules(), torch.zeros(4)
    exact = randomised(EquivariantTransformer({"types": 5}, **SMALL))
    rough = randomised(EquivariantTransformer({"types": 5}, pair_dtype=torch.bfloat16, **SMALL))
    rough.load_state_dict(exact.state_dict())
    a, b = exact(x, code), rough(x, code)
    for name in a:
        assert b[name].dtype == torch.float32
        assert 0 < (a[name] - b[name]).norm() < 0.03 * a[name].norm()


def test_single_atom_and_gradients_at_coinciding_atoms():
    net = randomised(EquivariantTransformer({"types": 5}, **SMALL))
    one = {k: v[:, :1] for k, v in molecules().items()}
    assert net(one, torch.zeros(4))["positions"].abs().max() == 0.0
    same = {"positions": torch.zeros(1, 3, 3, requires_grad=True), "types": torch.zeros(1, 3, 5)}
    net(same, torch.zeros(1))["types"].sum().backward()
    assert same["positions"].grad.isfinite().all()


def test_several_fields_keep_their_order():
    net = randomised(EquivariantTransformer({"types": 5, "charges": 1}, **SMALL))
    x = molecules() | {"charges": torch.ones(4, 6, 1)}
    out = net(x, torch.zeros(4))
    assert {k: v.shape[-1] for k, v in out.items()} == {"positions": 3, "types": 5, "charges": 1}


def test_heads_must_divide():
    with pytest.raises(ValueError, match="multiples"):
        EquivariantTransformer({"types": 5}, width=30, heads=8)
