"""``ckpt show``: all about one version, or what a load of it would need."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli.command import Settings, command, complete_models, paths_option
from ckpt.cli.render import age, count, metrics, print_json, table, version_json
from ckpt.core.printable import escape
from ckpt.core.sizes import size

if TYPE_CHECKING:
    from ckpt.core.documents import Document, Probe
    from ckpt.core.records import Environment, Version
    from ckpt.service.inspect import ModuleDescription, NamedClass


@command("show", short_help="Show what a version is, and was made on.")
@click.argument("reference", shell_complete=complete_models, metavar="REF")
@click.option("--trust", "needs", is_flag=True, help="Show what a load would have to import.")
@paths_option("Look for sources here too.")
def show(settings: Settings, reference: str, needs: bool, paths: tuple[str, ...]) -> None:
    """Show a version: its facts, what it was made on, its module tree, and its tensors.

    Nothing that the version names is imported; sources are only compared.
    """
    sys.path[:0] = [os.path.abspath(path) for path in paths]
    with settings.open() as repository:
        version = repository.get(reference)
        document = repository.document(version)
        environment = repository.environment(version)
        module = repository.describe(version) if document.state == "module" else None
    if needs:
        _show_needs(settings, version, module, paths)
    elif settings.as_json:
        print_json(_as_json(version, document, environment, module))
    else:
        _show_all(version, document, environment, module)


def _show_needs(
    settings: Settings,
    version: Version,
    module: ModuleDescription | None,
    paths: tuple[str, ...],
) -> None:
    classes = module.classes if module else ()
    if settings.as_json:
        print_json([asdict(one) for one in classes])
        return
    head = ["NAME", "NEEDS TRUST", "FROM", "SOURCE HERE"]
    rows = [
        [one.reference, "no" if one.allowed else "yes", _package(one), one.source]
        for one in classes
    ]
    click.echo(table(head, rows))
    wanted = sorted({one.reference.partition(":")[0] for one in classes if not one.allowed})
    if "__main__" in wanted:
        settings.say("a class of __main__ is only loaded from Python, which gives it: trust=[Net]")
    elif wanted:
        flags = " ".join(
            [f"--trust {escape(name, 80)}" for name in wanted]
            + [f"--path {escape(path, 80)}" for path in paths]
        )
        settings.say(f"to load it: ckpt verify {version.reference} {flags}")


def _package(one: NamedClass) -> str:
    return " ".join(part for part in (one.package, one.version) if part)


def _show_all(
    version: Version,
    document: Document,
    environment: Environment,
    module: ModuleDescription | None,
) -> None:
    for name, value in _facts(version, document, environment):
        if value:
            click.echo(f"{name:<12}{escape(value)}")
    if module is not None:
        click.echo(f"\n{module.tree}")
        changed = [one for one in module.classes if one.source == "changed"]
        for one in changed:
            click.echo(f"\nthe source of {escape(one.reference)} changed since the push")
    click.echo()
    head = ["TENSOR", "DTYPE", "SHAPE", "DEVICE", "KIND"]
    click.echo(table(head, [_tensor_row(tensor) for tensor in document.tensors]))


def _facts(version: Version, document: Document, environment: Environment) -> list[tuple[str, str]]:
    body: dict[str, Any] = dict(environment.body)
    torch = body.get("torch") or {}
    devices = ", ".join(device["name"] for device in torch.get("devices", []))
    proof = version.proof
    return [
        ("version", version.reference),
        ("digest", f"b3:{version.digest}"),
        ("size", f"{size(version.nbytes)}, {size(version.new_bytes)} new in the store"),
        ("created", f"{version.created_at:%Y-%m-%d %H:%M:%S} UTC, {age(version.created_at)}"),
        ("author", f"{version.author} on {body.get('host')}"),
        ("step", "" if version.step is None else str(version.step)),
        ("run", version.run),
        ("parent", version.parent or ""),
        ("aliases", " ".join(version.aliases)),
        ("metrics", metrics(version.metrics)),
        ("labels", " ".join(f"{key}={value}" for key, value in version.labels.items())),
        ("message", version.message or ""),
        ("made with", " ".join(f"{k} {v}" for k, v in body.get("versions", {}).items())),
        ("devices", devices or str(body.get("cpu", {}).get("name", ""))),
        ("proof", "" if proof is None else ", ".join(filter(None, (proof.kind, proof.reason)))),
        ("probe", "" if document.probe is None else _probe(document.probe)),
        ("unwrapped", _wrappers(document)),
        ("left out", ", ".join(document.dropped)),
    ]


def _probe(probe: Probe) -> str:
    """The conditions of the recorded outputs, and what is special about the forward."""
    conditions, behaviour = probe.conditions, probe.behaviour
    words = [
        f"on {conditions.device}, {conditions.name}, {conditions.capability}",
        count(conditions.threads, "thread"),
        f"torch {conditions.torch}",
    ]
    if not behaviour.repeats:
        words.append("the forward does not repeat itself")
    if behaviour.stochastic:
        words.append("draws random numbers")
    if behaviour.changes_state:
        words.append("changes its module")
    if behaviour.changes_inputs:
        words.append("changes its inputs")
    return ", ".join(words)


def _wrappers(document: Document) -> str:
    pairs = document.wrappers.items()
    return ", ".join(f"{path or '<root>'} from {' '.join(names)}" for path, names in pairs)


def _tensor_row(tensor: Any) -> list[str]:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    kind = tensor.kind if tensor.region is None else f"{tensor.kind}, view"
    layout = "" if tensor.layout == "strided" else f", {tensor.layout}"
    return [tensor.name, tensor.dtype, shape, tensor.device, kind + layout]


def _as_json(
    version: Version,
    document: Document,
    environment: Environment,
    module: ModuleDescription | None,
) -> dict[str, Any]:
    tensors = [
        {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "device": tensor.device,
            "kind": tensor.kind,
            "layout": tensor.layout,
            "chunks": list(tensor.chunks),
        }
        for tensor in document.tensors
    ]
    shown = {**version_json(version), "environment": dict(environment.body), "tensors": tensors}
    if module is not None:
        shown["module"] = {
            "tree": module.tree,
            "classes": [asdict(one) for one in module.classes],
            "probe": None if document.probe is None else _probe(document.probe),
            "wrappers": {path: list(names) for path, names in document.wrappers.items()},
            "dropped": list(document.dropped),
        }
    return shown


COMMANDS = {"show": show, "inspect": show}
