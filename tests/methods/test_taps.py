"""Taps: packing, scattering, splitting, and the graph of features that were written in place."""

from __future__ import annotations

import pytest
import torch

from mmtransfer.encoders import Taps
from mmtransfer.encoders.taps import attach_states


class TestTaps:
    def test_round_trip(self):
        lengths = torch.tensor([3, 0, 5])
        features = torch.randn(8, 2, 4)
        taps = Taps.pack(features, lengths)
        assert taps.steps == 5
        padded = taps.scatter(features[:, 1])
        assert padded.shape == (3, 5, 4)
        for row, length in enumerate(lengths.tolist()):
            assert torch.equal(padded[row, :length], taps.split()[row][:, 1])
            assert padded[row, length:].count_nonzero() == 0
        again = Taps.pack(torch.cat(taps.split()[::-1]), lengths.flip(0))
        assert torch.equal(again.scatter(again.features[:, 1]), padded.flip(0))

    def test_scatter_has_a_gradient(self):
        taps = Taps.pack(torch.zeros(4, 1, 2), torch.tensor([1, 3]))
        y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(taps.scatter, (y,))

    def test_full_batches_need_no_index(self):
        taps = Taps.pack(torch.zeros(4, 1, 2), torch.tensor([2, 2]))
        assert taps.index is None
        assert taps.scatter(torch.ones(4, 3)).shape == (2, 2, 3)

    def test_to(self):
        taps = Taps.pack(torch.zeros(4, 1, 2), torch.tensor([1, 3])).to(torch.bfloat16)
        assert taps.features.dtype == torch.bfloat16
        assert taps.lengths.dtype == taps.index.dtype == torch.int64

    def test_errors(self):
        with pytest.raises(ValueError, match="sum to the 4 frames"):
            Taps.pack(torch.zeros(4, 1, 2), torch.tensor([1, 2]))
        with pytest.raises(ValueError, match=">= 0"):
            Taps.pack(torch.zeros(4, 1, 2), torch.tensor([5, -1]))
        with pytest.raises(ValueError, match=r"\(N, L, C\)"):
            Taps.pack(torch.zeros(4, 2), torch.tensor([4]))
        with pytest.raises(ValueError, match=r"\(4, C_out\)"):
            Taps.pack(torch.zeros(4, 1, 2), torch.tensor([4])).scatter(torch.zeros(3, 2))


@pytest.mark.parametrize("padded", [False, True])
def test_attached_states(padded):
    index = torch.tensor([0, 1, 3]) if padded else None

    def written(*states):
        frames = [state.detach().flatten(0, 1) for state in states]
        features = torch.stack([frames[0], torch.zeros_like(frames[0]), frames[1]], dim=1)
        features = features if index is None else features[index]
        return attach_states(features, index, {0: states[0], 2: states[1]})

    states = tuple(torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(written, states)
    assert torch.autograd.gradgradcheck(lambda *s: written(*(t.square() for t in s)), states)
