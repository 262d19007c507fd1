"""`mmtransfer merge`: checkpoints on disk, by a recipe in YAML."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mmtransfer.cli import values
from mmtransfer.cli.messages import fail
from mmtransfer.cli.progress import show_progress

if TYPE_CHECKING:
    from .files.plan import Entry, Plan

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def merge(
    recipe: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")],
    output: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None,
    max_shard_size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Merge checkpoints: a weighted sum of models of one kind, or attention between architectures.

    Tensors stream from safetensors to safetensors, so that models need not fit into memory. The recipe is
    YAML: as mergekit has it for merge_method: linear (models with parameters.weight, parameters.normalize,
    base_model, dtype), or merge_method: mam with target, source, lambda and, if wanted, layers, layer_map,
    parts, bias, match_rms, dtype, for the source's queries, keys and values merged into the target's.
    OUT loads with from_pretrained; it appears when all of it is written, and not before.

    Args:
        recipe: YAML file; its folders are relative to the current one.
        output: folder for the result.
        max_shard_size: of a file of weights, such as 500MB.
        overwrite: replace an earlier merge in OUT, in one step at the end.
        dry_run: print the origin of each tensor, and write nothing.
    """
    limit = _read_size(max_shard_size)
    if output is None and not dry_run:
        fail("give OUT, the folder for the result, or --dry-run", 2)
    text, content = _read(recipe)
    from mmtransfer.data import DataError

    try:
        plan = _plan(content)
        if dry_run:
            print("\n".join(_describe(plan)))
            return
        assert output is not None
        _write(plan, text, output.expanduser(), limit, overwrite=overwrite)
    except ValueError as error:
        fail(f"{recipe}: {' '.join(str(error).split())}")
    except (DataError, OSError) as error:
        fail(" ".join(str(error).split()))


#: The commands of this folder.
COMMANDS = (merge,)


def _read_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B|)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        fail(f"--max-shard-size must be a number of bytes, or of KB, MB, GB or TB, got {text!r}", 2)
    return size


def _read(path: Path) -> tuple[str, Any]:
    """The text of a recipe, and its content."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        return text, values.parse(text)
    except (OSError, ValueError) as error:
        fail(f"the recipe {path} cannot be read as YAML ({error})")


def _plan(content: Any) -> Plan:
    # Imported here: help needs no torch.
    from .files.checkpoint import open_checkpoint
    from .files.recipe import LinearRecipe, read_recipe

    recipe = read_recipe(content)
    if isinstance(recipe, LinearRecipe):
        from .files.linear import plan_linear

        return plan_linear(recipe, [open_checkpoint(place) for place, _ in recipe.models])
    from .files.attention import plan_attention

    return plan_attention(recipe, open_checkpoint(recipe.target), open_checkpoint(recipe.source))


def _write(plan: Plan, text: str, output: Path, limit: int, *, overwrite: bool) -> None:
    from .files.run import carry_out

    begin = time.perf_counter()
    with show_progress(quiet=False) as progress:
        task = progress.add_task("merging", total=-(-plan.size // 10**6), detail="MB")
        for sentence in plan.notes:
            _note(sentence)
        files = carry_out(
            plan,
            text,
            output,
            max_shard_size=limit,
            overwrite=overwrite,
            on_bytes=lambda count: progress.advance(task, count / 10**6),
            note=_note,
        )
    seconds = time.perf_counter() - begin
    written = files[0] if len(files) == 1 else f"{len(files)} files"
    print(f"{_count(plan)}; {written}, {plan.size / 1e9:.2f} GB in {seconds:.1f} s: {output}")


def _note(sentence: str) -> None:
    print(f"mmtransfer: {sentence}", file=sys.stderr)


def _count(plan: Plan) -> str:
    copied = sum(entry.keeps_values for entry in plan.entries)
    return f"{len(plan.entries)} tensors, {len(plan.entries) - copied} merged and {copied} copied"


def _describe(plan: Plan) -> Iterator[str]:
    """A line for each tensor: name, shape, dtype and origin; then the totals."""
    rows = [(entry.name, _shape(entry), entry.dtype, _origin(entry, plan)) for entry in plan.entries]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        yield "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]])
    yield from plan.notes
    yield f"{_count(plan)}; {plan.size:,} bytes; nothing was written"


def _shape(entry: Entry) -> str:
    return "x".join(map(str, entry.shape)) or "scalar"


def _origin(entry: Entry, plan: Plan) -> str:
    places = {each.folder: each.place for each in plan.inputs}
    if entry.patches:
        return "; ".join(
            f"{each.target.part}: {1 - each.lam:.4g} own + {each.lam:.4g} "
            + (each.stored.name if each.stored else "zeros")
            for each in entry.patches
        )
    if entry.keeps_values:
        return f"copy of {places[entry.terms[0].stored.path.parent]}"
    return " + ".join(
        f"{term.weight:.4g} {places[term.stored.path.parent]}"
        + (f":{term.stored.name}" if term.stored.name != entry.name else "")
        for term in entry.terms
    )
