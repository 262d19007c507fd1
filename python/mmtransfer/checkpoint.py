"""One checkpoint for every adapted model: a folder with `config.json` and `model.safetensors`.

It holds what training changes (adapters, readout, head) and how to build it again, not the pretrained model.
Files are replaced atomically and read strictly.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

import mmkernels
from mmkernels.wrappers import chain
from mmtransfer import registry
from mmtransfer.data.errors import shown
from mmtransfer.data.inputs import AudioInput, find_audio_input
from mmtransfer.encoders.descriptions import ModelDescription
from mmtransfer.encoders.edit import restored, untouched_on_error
from mmtransfer.encoders.encoder import Encoder
from mmtransfer.encoders.precision import find_dtype
from mmtransfer.method import Foreign, Method
from mmtransfer.model import AdaptedModel
from mmtransfer.preparation import Prepared, get_prepared, is_prepared, prepare
from mmtransfer.tasks import find_task
from mmtransfer.tasks.labels import class_names, find_labels, set_labels

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT = "mmtransfer"
_SAVE = "save_id"
#: Fields whose type each configuration of transformers checks; its base class, by which the Trainer reads the
#: file, does not.
_CHECKED_BY_TRANSFORMERS = ("hidden_size", "d_model", "dim")


def save(
    model: nn.Module, folder: str | Path, *, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write the trained part of an `AdaptedModel`, or of a model that `prepare` prepared, into `folder`.

    The model may be inside wrappers (compiled, DistributedDataParallel); names are those without them.
    Parameters that were thawed by hand are written too, and thawed when the folder is loaded.
    Running statistics of batch norms are written too: they move in training mode even where the rest of the
    model is frozen. How the method is computed (backend, rewrite, recompute) is not part of it. An earlier
    checkpoint there is replaced, each file in one step; files of two saves are not loaded together. Other
    files are left alone. transformers' `from_pretrained` refuses the folder.

    Args:
        model: in which the tensors are.
        folder: made where it is missing.
        state_dict: the model's, where its own tensors are not whole (sharded training).

    Raises:
        ValueError: the model is neither of the two, or was reverted.
        FileExistsError: the folder has files of these names that are not a checkpoint of this package.
    """
    folder = _named(folder)
    own = _find_adapted(model) or get_prepared(model)
    if isinstance(own, AdaptedModel) and own.reverted:
        raise ValueError(f"the edit of {own.method.name} was reverted; there is nothing of it to save")
    call = "mmtransfer.load(folder)" if own is model else "mmtransfer.load_prepared(model, folder)"
    described = _describe(own)
    config = {
        "format": FORMAT,
        "mmkernels_version": mmkernels.__version__,
        # In both files, so that an interrupted save is noticed.
        _SAVE: uuid.uuid4().hex,
        # transformers would build a model from this file, of its default size: it shows this text instead.
        "model_type": described["base_model"]["model_type"],
        **dict.fromkeys(_CHECKED_BY_TRANSFORMERS, f"this is no model of transformers: load it by {call}"),
        **described,
    }
    refuse_foreign_files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ready = _detach(own.trained_tensors(), state_dict)
    foreign = (
        own.method.foreign_files(own.edit.encoder.root, own.head, ready) if isinstance(own, Prepared) else {}
    )
    text = json.dumps(config, indent=2) + "\n"
    metadata = {"format": "pt", _SAVE: config[_SAVE]}
    replace_file(folder / WEIGHTS, lambda path: save_file(ready, path, metadata=metadata))
    for name in _foreign_names():
        (folder / name).unlink(missing_ok=True)
    replace_file(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    for name, write in foreign.items():
        replace_file(folder / name, write)


def load(
    folder: str | Path,
    model: nn.Module | str | Path | None = None,
    *,
    language_model: str | Path | None = None,
    **runtime: Any,
) -> AdaptedModel:
    """The `AdaptedModel` that `save` wrote, in eval mode.

    Args:
        folder: where `config.json` and `model.safetensors` are.
        model: the transformers model with the encoder, or its folder or hub name; None loads the one named in
            the configuration.
        language_model: folder or hub name of the language model of the task, where it is not where it was.
        runtime: options of the method that say how it is computed: backend, rewrite, recompute.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another kind of checkpoint, an unknown method or task, a model of another type or size, or
            weights that do not fit, each named. The model is untouched.
    """
    config, tensors = _read(folder)
    if "head" in config:
        raise ValueError(f"{folder} was saved from a prepared model; load it by load_prepared(model, folder)")
    _check_whole(config, "task", folder)
    base = config["base_model"]
    if not isinstance(model, nn.Module):
        model = _load_base(model, base, folder)
    _check_base(Encoder(model), base, folder)
    method = _find_method(config, runtime)
    try:
        task = config["task"] and find_task(config["task"]["name"])(**_task_options(config, language_model))
        dtype = None if base["dtype"] is None else getattr(torch, base["dtype"])
        audio = None if config.get("input") is None else AudioInput.of(config["input"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"the configuration in {folder} has a wrong task, dtype or input ({error})"
        ) from error
    with untouched_on_error(Encoder(model).model):
        adapted = restored(AdaptedModel, model, method, task, dtype=dtype)
        try:
            _thaw(adapted, config, folder)
            _copy_strictly(adapted.trained_tensors(), tensors, folder)
        except BaseException:
            adapted.revert()
            raise
    adapted.audio = audio
    return adapted.eval()


def _task_options(config: Mapping[str, Any], language_model: str | Path | None) -> dict[str, Any]:
    """The fields of a task, with the place of its language model where that is given."""
    options = dict(config["task"]["options"])
    if language_model is None:
        return options
    if "language_model" not in options:
        raise ValueError(f"the task {config['task']['name']} has no language model")
    return {**options, "language_model": str(language_model)}


def _load_base(source: str | Path | None, base: Mapping[str, Any], folder: str | Path) -> nn.Module:
    """The encoder that a checkpoint was trained on, from `source` or where the configuration says."""
    place = source or base["name_or_path"]
    if not place:
        raise ValueError(f"{folder} was saved from an unnamed encoder; pass it as model")
    # As it was trained; transformers itself would take the dtype that the weights are stored in.
    precision = find_dtype(base.get("encoder_dtype", "float32"))
    try:
        return AutoModel.from_pretrained(place, dtype=precision)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the encoder of {folder} cannot be loaded from {place}; give it, or the folder where it is now: "
            "load(folder, encoder)"
        ) from error


def save_trained(model: AdaptedModel, folder: Path) -> None:
    """Write what training changes into `folder`, without what `load` needs: a state of a run in progress."""
    folder.mkdir(parents=True, exist_ok=True)
    ready = _detach(model.trained_tensors(), None)
    replace_file(folder / WEIGHTS, lambda path: save_file(ready, path, metadata={"format": "pt"}))


def load_trained(model: AdaptedModel, folder: Path) -> None:
    """Copy what `save_trained` wrote into a model of the same kind; ValueError if it does not fit."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _copy_strictly(model.trained_tensors(), tensors, folder)


def begin_with(model: AdaptedModel, folder: str | Path) -> None:
    """Copy readout and changes of the encoder from a checkpoint of the same method; heads may differ.

    ValueError for another method, or tensors that do not fit.
    """
    config = read_config(Path(folder).expanduser())
    if config["method"] != model.method.name:
        raise ValueError(f"{folder} was trained by {config['method']}, not by {model.method.name}")
    _check_base(model.encoder.parts, config["base_model"], folder)
    tensors = _read(Path(folder).expanduser())[1]
    own, given = (
        {name: tensor for name, tensor in found.items() if not name.startswith("head.")}
        for found in (model.trained_tensors(), tensors)
    )
    try:
        _copy_strictly(own, given, folder)
    except ValueError as error:
        if not (differences := _differences(config["options"], model.method.options())):
            raise
        raise ValueError(
            f"the weights in {folder} do not fit options of this run; it was trained with "
            f"{'; '.join(differences)}"
        ) from error


def load_prepared(
    model: nn.Module, folder: str | Path, *, description: ModelDescription | None = None, **runtime: Any
) -> Prepared:
    """Load what `save` wrote from a prepared model into the same model, prepared or not.

    A folder that `peft.PeftModel.save_pretrained` wrote with LoRA on queries and values is read too.

    Args:
        model: prepared here as the folder says, unless it is prepared already.
        description: as for `prepare`.
        runtime: for a model that is not prepared: options of the method that say how it is computed.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another kind of checkpoint, a model prepared in another way, or weights that do not fit,
            each named. The model is untouched.
    """
    if not (Path(folder) / CONFIG).exists() and (foreign := _read_foreign(folder, model, description)):
        return _load_foreign(model, foreign, folder, description, runtime)
    config, tensors = _read(folder)
    if "task" in config:
        raise ValueError(f"{folder} was saved from an AdaptedModel; load it by load(folder, model)")
    _check_whole(config, "head", folder)
    if is_prepared(model):
        prepared = get_prepared(model)
        _check_base(prepared.edit.encoder, config["base_model"], folder)
        _check_same(_describe(prepared), config, folder)
        labels = find_labels(model, config, folder)
        with untouched_on_error(prepared.edit.encoder.root):
            _thaw(prepared.edit.encoder.root, config, folder)
            _copy_strictly(prepared.trained_tensors(), tensors, folder)
        set_labels(model, labels)
        return prepared
    _check_base(Encoder(model, description), config["base_model"], folder)
    method = _find_method(config, runtime)
    labels = find_labels(model, config, folder)
    done: Prepared | None = None
    try:
        done = restored(prepare, model, method, head=config["head"], description=description)
        _thaw(done.edit.encoder.root, config, folder)
        _copy_strictly(done.trained_tensors(), tensors, folder)
        set_labels(model, labels)
        return done
    except BaseException:
        if done is not None:
            done.revert()
        raise


def _find_adapted(model: nn.Module) -> AdaptedModel | None:
    return next((module for module in chain(model) if isinstance(module, AdaptedModel)), None)


def _thaw(model: nn.Module, config: Mapping[str, Any], folder: str | Path) -> None:
    """Thaw the parameters that were thawed by hand when the folder was saved."""
    try:
        for name in config.get("thawed", []):
            model.get_parameter(name).requires_grad_(True)
    except AttributeError as error:
        raise ValueError(f"{folder} has trained a parameter that the model lacks ({error})") from error


def _read_foreign(
    folder: str | Path, model: nn.Module, description: ModelDescription | None
) -> Foreign | None:
    encoder = get_prepared(model).edit.encoder if is_prepared(model) else Encoder(model, description)
    found = (method.read_foreign(Path(folder), encoder) for method in registry.methods().values())
    return next((foreign for foreign in found if foreign is not None), None)


def _load_foreign(
    model: nn.Module,
    foreign: Foreign,
    folder: str | Path,
    description: ModelDescription | None,
    runtime: Mapping[str, Any],
) -> Prepared:
    if is_prepared(model):
        prepared = get_prepared(model)
        _copy_strictly(prepared.trained_tensors(), foreign.tensors, folder)
        return prepared
    prepared = prepare(
        model, registry.find(foreign.method, **runtime), head=foreign.head, description=description
    )
    try:
        _copy_strictly(prepared.trained_tensors(), foreign.tensors, folder)
    except BaseException:
        prepared.revert()
        raise
    return prepared


def _describe(model: AdaptedModel | Prepared) -> dict[str, Any]:
    """All that is needed to build the trained part again."""
    config: dict[str, Any] = {"method": model.method.name, "options": model.method.options()}
    if thawed := model.thawed():
        config["thawed"] = thawed
    if isinstance(model, Prepared):
        parts = model.edit.encoder
        base = _describe_base(parts)
        audio = find_audio_input(base["name_or_path"])
        return {
            **config,
            "head": model.head,
            "labels": class_names(parts.root) if model.head else None,
            "sampling_rate": None if audio is None else audio.sampling_rate,
            "base_model": base,
        }
    encoder, task = model.encoder, model.task
    base = _describe_base(encoder.parts)
    audio = find_audio_input(base["name_or_path"]) if model.audio is None else model.audio
    # A dtype only where the user chose one.
    dtype = str(encoder.dtype).removeprefix("torch.") if encoder.dtype_given else None
    return {
        **config,
        "task": None if task is None else {"name": task.name, "options": task.options()},
        "labels": getattr(task, "labels", None),
        "sampling_rate": None if audio is None else audio.sampling_rate,
        "input": None if audio is None else audio.describe(),
        "base_model": {**base, "dtype": dtype, "encoder_dtype": str(encoder.dtype).removeprefix("torch.")},
    }


def _describe_base(encoder: Encoder) -> dict[str, Any]:
    """The type and size that a model must share with the trained one, and where that was from."""
    config: Any = getattr(encoder.model, "config", None)
    return {
        "name_or_path": getattr(config, "_name_or_path", None),
        "model_type": encoder.description.model_type,
        "hidden_size": encoder.hidden_size,
        "num_layers": encoder.num_layers,
    }


def _check_whole(config: Mapping[str, Any], kind: str, folder: str | Path) -> None:
    """ValueError unless a configuration has all that loading reads; a file that was edited may lack some."""
    base = ["hidden_size", "model_type", "name_or_path", "num_layers"]
    task, head = config.get("task"), config.get("head", [])
    whole = (
        config.keys() >= {"method", "options", kind, "base_model"}
        and isinstance(config["method"], str)
        and _has_parts(config["options"])
        and isinstance(config["base_model"], dict)
        and config["base_model"].keys() >= {*base, *(["dtype"] if kind == "task" else [])}
        and isinstance(head, list)
        and (task is None or (isinstance(task, dict) and task.keys() >= {"name", "options"}))
    )
    if not whole:
        raise ValueError(
            f"the configuration in {folder} must have method, options by part, {kind} and base_model with "
            f"{', '.join(base)}"
        )


def _has_parts(options: Any) -> bool:
    return isinstance(options, dict) and all(isinstance(part, dict) for part in options.values())


def _find_method(config: Mapping[str, Any], runtime: Mapping[str, Any]) -> Method:
    """The method of a configuration. ValueError for an option that would change its training."""
    saved = registry.find(config["method"], **config["options"])
    found = registry.find(saved, **runtime)
    if found.options() != saved.options():
        raise ValueError(
            f"a checkpoint says how its method was trained; loading may set how it is computed "
            f"(backend, rewrite, recompute), got {', '.join(runtime)}"
        )
    return found


def _check_base(encoder: Encoder, base: Mapping[str, Any], folder: str | Path) -> None:
    for name, found in _describe_base(encoder).items():
        if name != "name_or_path" and found != base[name]:
            raise ValueError(f"{folder} was trained on an encoder of {name} {base[name]!r}, got {found!r}")


def _check_same(own: Mapping[str, Any], saved: Mapping[str, Any], folder: str | Path) -> None:
    found, earlier = (
        {"": {"method": config["method"], "head": config["head"]}, **config["options"]}
        for config in (own, saved)
    )
    differences = _differences(earlier, found)
    if differences:
        raise ValueError(f"{folder} was saved from a model prepared with {'; '.join(differences)}")


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields, by part, that differ: "depth 2, not 4"."""

    def flat(options: Mapping[str, Any]) -> dict[str, Any]:
        # As JSON has it: lists for tuples.
        return json.loads(
            json.dumps({key: value for part in options.values() for key, value in part.items()})
        )

    theirs, mine = flat(earlier), flat(now)
    return [
        f"{name} {shown(theirs.get(name))}, not {shown(mine.get(name))}"
        for name in {**mine, **theirs}
        if mine.get(name) != theirs.get(name)
    ]


def _named(folder: str | Path) -> Path:
    """The folder's path; an empty name would be the current folder."""
    if not isinstance(folder, (str, Path)) or str(folder) == "":
        raise ValueError(f"folder must be a path, got {folder!r}")
    return Path(folder)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of a checkpoint of an `AdaptedModel`.

    FileNotFoundError or ValueError if there is none, or only that of a prepared model.
    """
    config, _ = _read(folder)
    if "head" in config:
        raise ValueError(f"{folder} was saved from a prepared model, not from an AdaptedModel")
    _check_whole(config, "task", folder)
    return config


def copy_weights(own: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Copy the tensors of a checkpoint over exactly these; ValueError lists the differences."""
    _copy_strictly(own, _read(folder)[1], folder)


def _read(folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = _named(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; a checkpoint has {CONFIG} and {WEIGHTS}")
    config = _read_config(folder / CONFIG)
    if config is None or config.get("format") != FORMAT:
        raise ValueError(
            f'{folder / CONFIG} must have "format": {FORMAT!r}; it is no checkpoint of mmtransfer'
        )
    try:
        with safe_open(folder / WEIGHTS, "pt") as weights:
            save = (weights.metadata() or {}).get(_SAVE)
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read ({error})") from error
    # Weights that another tool wrote have no mark.
    if save is not None and save != config.get(_SAVE):
        raise ValueError(
            f"{CONFIG} and {WEIGHTS} in {folder} are from two saves, of which the later was interrupted; "
            "save again"
        )
    return config, tensors


def _copy_strictly(
    own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: str | Path
) -> None:
    """Copy tensors over exactly these, of these shapes; a ValueError lists the differences."""
    differences = [f"{name} is missing" for name in sorted(own.keys() - tensors.keys())]
    differences += [f"{name} is unknown" for name in sorted(tensors.keys() - own.keys())]
    differences += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    differences += [
        f"{name} was saved in {tensors[name].dtype} and would be rounded to {own[name].dtype}; load the "
        f"model in {tensors[name].dtype}"
        for name in sorted(own.keys() & tensors.keys())
        if torch.promote_types(tensors[name].dtype, own[name].dtype) != own[name].dtype
    ]
    differences += [
        f"{name} is on the meta device, load its model first" for name in own if own[name].is_meta
    ]
    if differences:
        more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise ValueError(f"the weights in {source} do not fit: {'; '.join(differences[:8])}{more}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _detach(
    own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Copies for a file, where tensors of the model share memory, which the format does not have."""
    if given is not None and (missing := own.keys() - given.keys()):
        raise ValueError(f"state_dict lacks {len(missing)} trained tensors, such as {min(missing)}")
    source = own if given is None else {name: given[name] for name in own}
    ready: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in source.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to save")
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return ready


def refuse_foreign_files(folder: Path) -> None:
    """FileExistsError if a folder has files that `save` would replace and that are not of this package."""
    present = [name for name in (CONFIG, WEIGHTS, *_foreign_names()) if (folder / name).exists()]
    if not present:
        return
    config = _read_config(folder / CONFIG) if CONFIG in present else None
    if config is None or config.get("format") != FORMAT:
        raise FileExistsError(
            f"{folder} holds a {present[0]} that is not from mmtransfer; save into another folder"
        )


def _foreign_names() -> list[str]:
    """Files of other libraries that a checkpoint may have."""
    return [name for method in registry.methods().values() for name in method.FOREIGN_FILES]


def _read_config(path: Path) -> dict[str, Any] | None:
    """The configuration, or None if the file does not hold a JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return config if isinstance(config, dict) else None


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file next to the target, then put it in place in one step."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes files private; the result gets the rights that a plain open would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
