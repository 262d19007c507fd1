"""`mmtransfer info` and `mmtransfer methods`."""

from __future__ import annotations


def info() -> None:
    """Print versions, devices, and which backend runs each kernel here."""
    from mmkernels._info import collect, render

    print(render(collect()))


def methods() -> None:
    """Print the methods, their papers and their options (`--set option=value`)."""
    import dataclasses

    from mmtransfer import registry

    kinds: dict[str, str] = {}
    for method in registry.methods().values():
        found = method()
        kind = "edit" if found.has_edit else "readout"
        kinds[kind] = found.name
        options = [f"{each.name}={getattr(found, each.name)}" for each in dataclasses.fields(found)]
        print(f"{found.name:18} {kind:8} {found.about()}")
        if options:
            print(f"{'':28}{', '.join(options)}")
    print(f"\nA readout + an edit is a method too: {kinds['readout']}+{kinds['edit']}")
