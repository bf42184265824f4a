"""Time embeddings."""

from __future__ import annotations

import math

import pytest
import torch

from shared.nn.embedding import Fourier, Sinusoidal, TimeEmbedding, sinusoidal


@pytest.mark.parametrize("endpoint", [False, True])
@pytest.mark.parametrize("cosine_first", [False, True])
def test_sinusoidal_frequencies(endpoint, cosine_first):
    code = torch.tensor([0.0, 1.0, 700.0], dtype=torch.float64)
    out = sinusoidal(code, 8, 100.0, cosine_first, endpoint)
    for row, t in enumerate(code.tolist()):
        frequencies = [100.0 ** (-i / (3 if endpoint else 4)) for i in range(4)]
        sines = [math.sin(t * f) for f in frequencies]
        cosines = [math.cos(t * f) for f in frequencies]
        expected = cosines + sines if cosine_first else sines + cosines
        # the published layers hold their frequencies in float32
        torch.testing.assert_close(out[row], torch.tensor(expected).double(), rtol=0, atol=2e-4)


def test_uvit_embedding_agrees_with_the_published_one(golden):
    data, _ = golden("08_uvit_p2_class")
    expected = next(v for k, v in data.items() if k.startswith("out.timestep_embedding"))
    out = sinusoidal(data["in.t"], expected.shape[1], cosine_first=True)
    torch.testing.assert_close(out.to(expected), expected, rtol=0, atol=2e-4)


def test_odd_width_ends_in_zero():
    assert sinusoidal(torch.ones(2), 5).shape == (2, 5)
    assert sinusoidal(torch.ones(2), 5)[:, -1].tolist() == [0.0, 0.0]


def test_fourier_frequencies_repeat_and_travel_with_the_weights():
    first, second = Fourier(16), Fourier(16)
    assert torch.equal(first.frequencies, second.frequencies)
    assert not torch.equal(first.frequencies, Fourier(16, seed=1).frequencies)
    assert "frequencies" in first.state_dict()
    out = first(torch.tensor([0.0, 0.3]))
    assert out.shape == (2, 16)
    assert out[0].tolist() == [0.0] * 8 + [1.0] * 8


def test_time_embedding_shapes_and_sensitivity():
    for features in (None, Sinusoidal(12, 50.0), Fourier(12)):
        layer = TimeEmbedding(12, 20, features)
        out = layer(torch.tensor([0.1, 0.1, 0.5]))
        assert out.shape == (3, 20)
        assert torch.equal(out[0], out[1])
        assert not torch.allclose(out[0], out[2])
    assert TimeEmbedding(12)(torch.zeros(1)).shape == (1, 48)
