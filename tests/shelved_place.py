"""A repository on disk beside its model: two actors in it, and how it is compared with the model.

What is there is read without ckpt: by SQL, and by the offsets of the chunks in the pack files.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from crash_driver import check_tables
from shelf import Content, Facts, Kept, Shelf

import ckpt
from ckpt.core.digests import digest_of
from ckpt.core.errors import NotFoundError

_CHUNKS = """
    SELECT models.name, versions.number, chunks.digest, packs.key, chunks.offset,
           chunks.length
    FROM versions JOIN models ON models.id = versions.model
    LEFT JOIN refs ON refs.version = versions.id
    LEFT JOIN packs ON packs.id = refs.pack
    LEFT JOIN chunks ON chunks.pack = packs.id
"""
_ALIASES = """
    SELECT models.name, aliases.name, versions.number
    FROM aliases JOIN models ON models.id = aliases.model
    JOIN versions ON versions.id = aliases.version AND versions.model = models.id
"""
_NEEDED = """
    SELECT key FROM packs WHERE id IN (SELECT pack FROM refs) OR id IN (SELECT pack FROM claims)
"""


class Place:
    """A copy of an empty repository, the model of it, and two actors."""

    def __init__(self, template: Path, folder: Path) -> None:
        shutil.copytree(template, folder)
        self.folder = folder
        self.root = folder / ".ckpt"
        self.shelf = Shelf()
        self._actors: dict[int, ckpt.Repository] = {}
        self._books = sqlite3.connect(self.root / "registry.db", isolation_level=None)

    def close(self) -> None:
        for repo in self._actors.values():
            repo.close()
        self._books.close()

    def actor(self, number: int) -> ckpt.Repository:
        """The repository as one of the actors has it open."""
        if number not in self._actors:
            self._actors[number] = ckpt.open(self.folder)
        return self._actors[number]

    def reopen(self, actor: int, died: type[BaseException] | None = None) -> None:
        """One actor, which may have died, begins anew."""
        left = self._actors.pop(actor, None)
        with suppress(*[died] if died else []):
            if left is not None:
                left.close()

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run one statement on the registry, behind its back."""
        return self._books.execute(statement, values).fetchall()

    def numbers(self, model: str) -> set[int]:
        """The versions of a model that are there."""
        query = "SELECT number FROM versions JOIN models ON models.id = model WHERE name = ?"
        return {number for (number,) in self.rows(query, model)}

    def push(self, actor: int, model: str, facts: Facts) -> ckpt.Version:
        """Push what the facts say, as a file or as a state."""
        said: dict[str, Any] = {
            "step": facts.step,
            "metrics": facts.metrics,
            "labels": facts.labels,
            "run": facts.run,
            "alias": facts.aliases,
        }
        if facts.content.kind == "state":
            return self.actor(actor).push(facts.content.state, model, **said)
        file = self.folder / "pushed.safetensors"
        file.write_bytes(facts.content.file)
        return self.actor(actor).push_file(file, model, **said)

    def check_pull(self, actor: int, version: str | ckpt.Version, content: Content) -> None:
        """Pull it as what was pushed."""
        repo = self.actor(actor)
        if content.kind == "file":
            out = self.folder / "pulled.safetensors"
            repo.pull_file(version, out, force=True)
            assert out.read_bytes() == content.file
            return
        state = repo.pull(version)
        assert {name: tensor.numpy().tobytes() for name, tensor in state.items()} == content.tensors
        assert all(tensor.dtype == torch.uint8 for tensor in state.values())

    def check_all_pulls(self, actor: int = 0) -> None:
        for kept in self.shelf.versions:
            self.check_pull(actor, kept.reference, kept.content)

    def check_record(self, version: ckpt.Version, kept: Kept) -> None:
        """What ckpt says of a version is what was said of it."""
        aliases = self.shelf.lines[kept.model].aliases_of(kept.number)
        assert version.reference == kept.reference
        assert (version.step, version.run, version.parent) == (kept.step, kept.run, kept.parent)
        assert (version.labels, version.aliases) == (kept.labels, aliases)
        assert repr(version.metrics) == repr(kept.metrics)

    def check_shelf(self) -> None:
        """Exactly the versions of the model are there, with their bytes, numbers and aliases."""
        places = self._places()
        expected = {(kept.model, kept.number): kept for kept in self.shelf.versions}
        assert places.keys() == expected.keys()
        bodies: dict[str, bytes] = {}
        for which, kept in expected.items():
            for body in kept.content.tensors.values():
                key, offset, length = places[which][digest_of(body)]
                if key not in bodies:
                    bodies[key] = (self.root / "store" / key).read_bytes()
                assert bodies[key][offset : offset + length] == body, kept.reference
        aliases = {
            (model, alias, number)
            for model, line in self.shelf.lines.items()
            for alias, number in line.aliases.items()
        }
        assert set(self.rows(_ALIASES)) == aliases
        counters = {name: line.next_number for name, line in self.shelf.lines.items()}
        assert dict(self.rows("SELECT name, next_number FROM models")) == counters
        check_tables(self._books, self.root / "store")

    def _places(self) -> dict[tuple[str, int], dict[str, tuple[str, int, int]]]:
        """Where each chunk of each version lies: key, offset, length."""
        found: dict[tuple[str, int], dict[str, tuple[str, int, int]]] = {}
        for model, number, digest, *place in self.rows(_CHUNKS):
            key, offset, length = place
            found.setdefault((model, number), {})[digest] = (key, offset, length)
        return found

    def check_gone(self, actor: int, version: ckpt.Version) -> None:
        """A version that was removed is not answered, by no name."""
        for name in (version, version.reference):
            with suppress(NotFoundError):
                self.actor(actor).pull(name)
                raise AssertionError(f"{version} was removed")

    def pack_files(self) -> dict[str, int]:
        """The pack files in the store by key, with their sizes."""
        store = self.root / "store"
        found = {path: path.stat().st_size for path in store.glob("packs/*/*")}
        return {str(path.relative_to(store)): size for path, size in found.items()}

    def needed_keys(self) -> set[str]:
        """The keys of packs that a version refers to or an open push claims."""
        return {key for (key,) in self.rows(_NEEDED)}

    def keys_of(self, kept: Kept) -> set[str]:
        """The keys of the packs of a version."""
        return {
            row[3] for row in self.rows(_CHUNKS) if row[:2] == (kept.model, kept.number) and row[3]
        }

    def expected_keys(self) -> set[str]:
        """What a collection leaves: what is needed, and what an open push may have written."""
        open_pushes = self.open_pushes()
        own = {key for key in self.pack_files() if Path(key).name.partition("-")[0] in open_pushes}
        return self.needed_keys() | own

    def dead_keys(self) -> set[str]:
        return {key for (key,) in self.rows("SELECT key FROM dead_keys")}

    def broken_keys(self) -> set[str]:
        return {key for (key,) in self.rows("SELECT key FROM packs WHERE state = 'broken'")}

    def freed_by(self, victims: Iterable[Kept]) -> int:
        """The bytes of the packs that only these versions need."""
        ending = [id(victim) for victim in victims]
        going, kept = set[str](), set[str]()
        for one in self.shelf.versions:
            (going if id(one) in ending else kept).update(self.keys_of(one))
        sizes = self.pack_files()
        return sum(sizes[key] for key in going - kept)

    def open_pushes(self) -> set[str]:
        return {push for (push,) in self.rows("SELECT id FROM pushes WHERE state = 'open'")}

    def unfinished_pushes(self) -> set[str]:
        """The pushes that have temporary files of packs in the store."""
        names = [path.name for path in (self.root / "store" / ".tmp").glob("*-*.safetensors.*")]
        return {name.partition("-")[0] for name in names}

    def end_leases(self) -> None:
        """The leases of pushes that died are over, by the database's clock."""
        self.rows("UPDATE pushes SET expires_at = 0 WHERE state = 'open'")
