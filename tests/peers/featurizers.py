"""s3prl's two ``Featurizer`` classes.

The twins have the statements of s3prl 0.4.18 (Apache-2.0), which are those of 0.4.10 too: ``accelerate``
compares them. The constructor of the second needs an upstream that runs; its twin takes a number of layers.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Featurizer(nn.Module):
    """``s3prl.nn.Featurizer``."""

    def __init__(self, upstream: Any, layer_selections: Any = None, normalize: bool = False) -> None:
        super().__init__()
        assert len(set(upstream.hidden_sizes)) == 1
        assert len(set(upstream.downsample_rates)) == 1
        self._output_size = upstream.hidden_sizes[0]
        self._downsample_rate = upstream.downsample_rates[0]
        self.normalize = normalize

        if upstream.num_layers > 1:
            if layer_selections is not None:
                assert upstream.num_layers >= len(layer_selections)
                self.layer_selections = sorted(layer_selections)
            else:
                self.layer_selections = list(range(upstream.num_layers))
            self.weights = nn.Parameter(torch.zeros(len(self.layer_selections)))

    @property
    def output_size(self) -> int:
        return self._output_size

    @property
    def downsample_rate(self) -> int:
        return self._downsample_rate

    def _weighted_sum(self, all_hs: Any, all_lens: Any) -> tuple[Tensor, Tensor]:
        assert len(all_hs) == len(all_lens) > 1
        for n in all_lens[1:]:
            torch.allclose(all_lens[0], n)
        stacked_hs = torch.stack(all_hs, dim=0)

        if self.normalize:
            stacked_hs = F.layer_norm(stacked_hs, (stacked_hs.shape[-1],))

        _, *origin_shape = stacked_hs.shape
        stacked_hs = stacked_hs.view(len(self.layer_selections), -1)
        norm_weights = F.softmax(self.weights, dim=-1)
        weighted_hs = (norm_weights.unsqueeze(-1) * stacked_hs).sum(dim=0)
        weighted_hs = weighted_hs.view(*origin_shape)

        return weighted_hs, all_lens[0]

    def forward(self, all_hs: Any, all_lens: Any) -> tuple[Tensor, Tensor]:
        if len(all_hs) == 1:
            return all_hs[0], all_lens[0]

        all_hs = [h for idx, h in enumerate(all_hs) if idx in self.layer_selections]
        all_lens = [n for idx, n in enumerate(all_lens) if idx in self.layer_selections]
        hs, hs_len = self._weighted_sum(all_hs, all_lens)
        return hs, hs_len


class PaddedFeaturizer(nn.Module):
    """``s3prl.upstream.interfaces.Featurizer``, from the choice of the features to their sum."""

    def __init__(self, layer_num: int, normalize: bool = False) -> None:
        super().__init__()
        self.layer_num, self.normalize = layer_num, normalize
        self.feature_selection, self.layer_selection = "hidden_states", None
        self.weights = nn.Parameter(torch.zeros(self.layer_num))

    def _weighted_sum(self, feature: Any) -> Tensor:
        assert self.layer_num == len(feature), "layer drop"
        stacked_feature = torch.stack(feature, dim=0)

        if self.normalize:
            stacked_feature = F.layer_norm(stacked_feature, (stacked_feature.shape[-1],))

        _, *origin_shape = stacked_feature.shape
        stacked_feature = stacked_feature.view(self.layer_num, -1)
        norm_weights = F.softmax(self.weights, dim=-1)
        weighted_feature = (norm_weights.unsqueeze(-1) * stacked_feature).sum(dim=0)
        weighted_feature = weighted_feature.view(*origin_shape)

        return weighted_feature

    def forward(self, features: dict[str, list[Tensor]]) -> Tensor:
        return self._weighted_sum(features["hidden_states"])


PaddedFeaturizer.__name__ = PaddedFeaturizer.__qualname__ = "Featurizer"


def _installed() -> dict[str, type[Any]]:
    """The classes of s3prl, from their files: its packages import audio libraries that these do not need."""
    spec = importlib.util.find_spec("s3prl")
    if spec is None or spec.origin is None:
        return {}
    root = Path(spec.origin).parent
    needless: dict[str, Any] = {"s3prl.hub": mock.MagicMock(), "s3prl.util.pseudo_data": mock.MagicMock()}
    with mock.patch.dict(sys.modules, needless):
        return {
            "s3prl.nn": _load(root / "nn" / "upstream.py").Featurizer,
            "s3prl.upstream": _load(root / "upstream" / "interfaces.py").Featurizer,
        }


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"installed_s3prl_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


INSTALLED = _installed()
#: ``s3prl.nn.Featurizer`` to compare with: the twin, and the real one where s3prl is installed.
FEATURIZERS: dict[str, type[Any]] = {"written": Featurizer} | {
    name: cls for name, cls in INSTALLED.items() if name == "s3prl.nn"
}
