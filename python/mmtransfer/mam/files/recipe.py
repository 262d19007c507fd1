"""Recipes of `mmtransfer merge`: mergekit's YAML for `linear`, and `mam`, between architectures."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .weights import Weights, is_number, read_weights

#: Names of dtypes in recipes, and those that safetensors writes.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_LINEAR = (
    "merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "missing",
)  # fmt: skip
_MAM = (
    "merge_method", "target", "source", "lambda", "layers", "layer_map", "parts", "bias", "match_rms",
    "dtype",
)  # fmt: skip
#: Keys of mergekit without a meaning here.
_FOREIGN = ("slices", "modules", "input_model_parameters", "tokenizer", "chat_template", "density", "gamma",
            "epsilon", "rescale", "lambda", "t")  # fmt: skip


@dataclass(frozen=True)
class LinearRecipe:
    """A weighted sum of models of one kind.

    Attributes:
        models: folders or hub names, each with its weights.
        weights: for tensors that a model gives no weight.
        target: index of the model whose names, configuration and other files the result has.
        normalize: divide the weights of each tensor by their sum.
        dtype: of the result's floating-point tensors; None: as the target has them.
        missing: of tensors that not all models have: an error, or the target's are kept.
    """

    models: tuple[tuple[str, Weights | None], ...]
    weights: Weights | None
    target: int
    normalize: bool
    dtype: str | None
    missing: Literal["error", "keep"]


@dataclass(frozen=True)
class AttentionRecipe:
    """Queries, keys and values of a source merged into a target of another architecture.

    Attributes:
        target, source: folders or hub names.
        lam: weight of the source, in [0, 1]: one, or one for each merged layer.
        options: layers, layer_map, parts, bias and match_rms, as `mmtransfer.mam.merge` takes them.
        dtype: as in `LinearRecipe`.
    """

    target: str
    source: str
    lam: float | tuple[float, ...]
    options: dict[str, Any]
    dtype: str | None


def read_recipe(content: Any) -> LinearRecipe | AttentionRecipe:
    """The recipe that YAML holds; ValueError names the key, its value and those allowed."""
    if not content or not isinstance(content, dict):
        given = "nothing" if not content else type(content).__name__
        raise ValueError(
            f"a recipe must hold merge_method and its settings, one `name: value` a line, got {given}"
        )
    method = content.get("merge_method")
    if method == "linear":
        return _read_linear(content)
    if method == "mam":
        return _read_attention(content)
    raise ValueError(f"merge_method must be linear or mam, got {method!r}")


def _without_nulls(value: Any) -> Any:
    """A recipe without the keys whose value is null: mergekit takes them as if they were not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _read_linear(content: dict[str, Any]) -> LinearRecipe:
    content = _without_nulls(content)
    _check_keys("", content, _LINEAR)
    given = content.get("models")
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"models must list two models or more, got {given!r}")
    models = tuple(_read_model(f"models[{index}]", each) for index, each in enumerate(given))
    base = content.get("base_model", models[0][0])
    places = [place for place, _ in models]
    if base not in places:
        raise ValueError(f"base_model must be one of the models, {', '.join(places)}, got {base!r}")
    if content.get("tokenizer_source", "base") != "base":
        raise ValueError(f"tokenizer_source must be base, got {content['tokenizer_source']!r}")
    parameters = _mapping("parameters", content.get("parameters", {}))
    _check_keys("parameters.", parameters, ("weight", "normalize", "int8_mask"))
    return LinearRecipe(
        models=models,
        weights=read_weights("parameters.weight", parameters["weight"]) if "weight" in parameters else None,
        target=places.index(base),
        normalize=_choice("parameters.normalize", parameters.get("normalize", True), (True, False)),
        dtype=_read_dtype("out_dtype" if "out_dtype" in content else "dtype", content),
        missing=_choice("missing", content.get("missing", "error"), ("error", "keep")),
    )


def _read_model(where: str, given: Any) -> tuple[str, Weights | None]:
    entry = _mapping(where, given)
    _check_keys(f"{where}.", entry, ("model", "parameters"))
    parameters = _mapping(f"{where}.parameters", entry.get("parameters", {}))
    _check_keys(f"{where}.parameters.", parameters, ("weight",))
    weights = read_weights(f"{where}.parameters.weight", parameters["weight"]) if parameters else None
    return _text(f"{where}.model", entry.get("model")), weights


def _read_attention(content: Mapping[str, Any]) -> AttentionRecipe:
    _check_keys("", content, _MAM)
    lam = content.get("lambda")
    values: list[Any] = lam if isinstance(lam, list) else [lam]
    if not values or not all(is_number(each) and 0 <= each <= 1 for each in values):
        raise ValueError(
            f"lambda must be a number in [0, 1], or a list of one for each merged layer, got {lam!r}"
        )
    options: dict[str, Any] = {}
    if content.get("layers", "all") != "all":
        options["layers"] = _read_layers("layers", content["layers"])
    if content.get("layer_map") is not None:
        options["layer_map"] = _read_layers("layer_map", content["layer_map"])
    if "parts" in content:
        parts = content["parts"]
        known = isinstance(parts, list) and parts and all(part in ("q", "k", "v") for part in parts)
        if not known or len(set(parts)) < len(parts):
            raise ValueError(f"parts must list some of q, k and v, got {parts!r}")
        options["parts"] = tuple(parts)
    for key in ("bias", "match_rms"):
        if key in content:
            options[key] = _choice(key, content[key], (True, False))
    return AttentionRecipe(
        target=_text("target", content.get("target")),
        source=_text("source", content.get("source")),
        lam=tuple(map(float, lam)) if isinstance(lam, list) else float(values[0]),
        options=options,
        dtype=_read_dtype("dtype", content),
    )


def _read_layers(where: str, given: Any) -> list[int]:
    """Indices of layers, of a list or of a text `12-19`, which includes both ends."""
    if isinstance(given, str):
        first, _, last = given.partition("-")
        if first.strip().isdigit() and last.strip().isdigit() and int(first) <= int(last):
            return list(range(int(first), int(last) + 1))
    elif isinstance(given, list) and given and all(type(each) is int for each in given):
        return given
    raise ValueError(f"{where} must be a list of layers or FIRST-LAST, got {given!r}")


def _check_keys(where: str, content: Mapping[str, Any], known: Iterable[str]) -> None:
    known = list(known)
    for key in content:
        if key in known:
            continue
        if key in _FOREIGN:
            raise ValueError(f"{where}{key} is not supported; there are {', '.join(known)}")
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{where}{key} is none of {', '.join(known)}{hint}")


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold `name: value` lines, got {value!r}")
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} must be the folder or the hub name of a model, got {value!r}")
    return value


def _choice(where: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if not any(value is each or (isinstance(each, str) and value == each) for each in allowed):
        names = [str(each).lower() if isinstance(each, bool) else each for each in allowed]
        raise ValueError(f"{where} must be {' or '.join(names)}, got {value!r}")
    return value


def _read_dtype(key: str, content: Mapping[str, Any]) -> str | None:
    value = content.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or value not in DTYPES:
        raise ValueError(f"{key} must be one of {', '.join(DTYPES)}, got {value!r}")
    return DTYPES[value]
