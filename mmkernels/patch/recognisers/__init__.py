"""One file per library whose fragments are replaced; a new file adds its recogniser here."""

from __future__ import annotations

from mmkernels.patch.recogniser import Recogniser
from mmkernels.patch.recognisers.adapterhub import AdapterHubLayer
from mmkernels.patch.recognisers.attn_adapters import AttnAdapter, AttnAdapterInLayer
from mmkernels.patch.recognisers.s3prl import S3prlFeaturizer
from mmkernels.patch.recognisers.sequential import SequentialAdapter
from mmkernels.patch.recognisers.transformers import WeightedLayerSum

#: Asked in this order; the first that claims a module decides on it.
RECOGNISERS: tuple[Recogniser, ...] = (
    WeightedLayerSum(),
    S3prlFeaturizer(),
    AdapterHubLayer(),
    AttnAdapterInLayer(),
    AttnAdapter(),
)
#: Decides on the modules that the user names.
NAMED_ADAPTER = SequentialAdapter()
