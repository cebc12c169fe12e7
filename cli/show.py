"""``ckpt show``: all about one version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import age, metrics, print_json, size, table, version_json
from ckpt.core.printable import escape

if TYPE_CHECKING:
    from ckpt.core.documents import Document
    from ckpt.core.records import Environment, Version


@command("show")
@click.argument("reference", metavar="REF")
def show(settings: Settings, reference: str) -> None:
    """Show a version: its facts, what it was made on, and its tensors."""
    with settings.open() as repository:
        version = repository.get(reference)
        document = repository.document(version)
        environment = repository.environment(version)
    if settings.as_json:
        print_json(_as_json(version, document, environment))
        return
    for name, value in _facts(version, environment):
        if value:
            click.echo(f"{name:<12}{escape(value)}")
    click.echo()
    head = ["TENSOR", "DTYPE", "SHAPE", "DEVICE", "KIND"]
    click.echo(table(head, [_tensor_row(tensor) for tensor in document.tensors]))


def _facts(version: Version, environment: Environment) -> list[tuple[str, str]]:
    body: dict[str, Any] = dict(environment.body)
    torch = body.get("torch") or {}
    devices = ", ".join(device["name"] for device in torch.get("devices", []))
    return [
        ("version", version.reference),
        ("digest", f"b3:{version.digest}"),
        ("size", f"{size(version.nbytes)}, {size(version.new_bytes)} of it added"),
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
    ]


def _tensor_row(tensor: Any) -> list[str]:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    kind = tensor.kind if tensor.region is None else f"{tensor.kind}, view"
    layout = "" if tensor.layout == "strided" else f", {tensor.layout}"
    return [tensor.name, tensor.dtype, shape, tensor.device, kind + layout]


def _as_json(version: Version, document: Document, environment: Environment) -> dict[str, Any]:
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
    body = dict(environment.body)
    return {**version_json(version), "environment": body, "tensors": tensors}


COMMANDS = {"show": show, "inspect": show}
