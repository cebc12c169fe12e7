"""Full disks, foreign folders, damaged packs and signals: typed, clean, and over with the cause."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.numpy import save_file

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import AccessError, IntegrityError, SpaceError
from ckpt.core.records import Pack

PROGRAM = Path(sys.executable).with_name("ckpt")


def leftovers(repo: ckpt.Repository) -> list[Path]:
    """Temporary files that an operation left in the store."""
    return list((repo.location.store / ".tmp").glob("*"))


def pack_of(repo: ckpt.Repository) -> Path:
    (pack,) = repo.location.store.glob("packs/*/*")
    return pack


@pytest.fixture
def small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to push into the repository of ``repo``, which other processes find as well."""
    monkeypatch.setenv("CKPT_REPO", str(tmp_path))
    path = tmp_path / "small.safetensors"
    arrays = {"w": numpy.arange(3000.0), "big": numpy.arange(300_000.0)}  # written by threads
    save_file(arrays, path)
    return path


def run(
    *arguments: str | Path,
    program: Sequence[str | Path] = (sys.executable,),
    stdout: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )


def failing(kind: str, number: int) -> Callable[..., Any]:
    """A hook that makes every act of one kind fail with this errno."""

    def hook(found: str, act: Any, args: tuple[Any, ...]) -> Any:
        if found == kind:
            raise OSError(number, os.strerror(number))
        return act(*args)

    return hook


@pytest.mark.parametrize("number", [28, 122], ids=["ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("kind", ["write", "create", "fsync", "link"])
def test_a_full_disk_stops_a_push_cleanly(repo: ckpt.Repository, kind: str, number: int) -> None:
    state = {"w": torch.randn(3000)}
    with observed(failing(kind, number)), pytest.raises(SpaceError) as caught:
        repo.push(state, "m")
    assert (caught.value.code, caught.value.exit_code) == ("no-space", 8)
    assert leftovers(repo) == []
    assert repo.models() == []
    assert repo.push(state, "m").number == 1


def test_a_full_disk_stops_a_pull_cleanly(repo: ckpt.Repository, tmp_path: Path) -> None:
    repo.push({"w": torch.randn(3000)}, "m")
    target = tmp_path / "out"
    target.mkdir()
    with observed(failing("write", 28)), pytest.raises(SpaceError):
        repo.pull_file("m", target / "m.safetensors")
    assert list(target.iterdir()) == []
    repo.pull_file("m", target / "m.safetensors")


def full_at(number: int) -> tuple[Callable[..., Any], list[int]]:
    """A hook in which write ``number`` finds the disk full, and a list that is not empty then."""
    writes, struck = itertools.count(), list[int]()

    def hook(kind: str, act: Any, args: tuple[Any, ...]) -> Any:
        if kind == "write" and next(writes) == number:
            struck.append(number)
            raise OSError(28, os.strerror(28))
        return act(*args)

    return hook, struck


def test_a_disk_that_fills_at_any_write_stops_push_and_pull_cleanly(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    state = {f"w{n}": torch.randn(3000) for n in range(4)}
    acts: list[Callable[[], object]] = [
        lambda: repo.push(state, "m"),
        lambda: repo.pull_file("m", target / "m.safetensors"),
    ]
    for act in acts:
        failed = list[str]()
        while True:
            hook, struck = full_at(len(failed))
            try:
                with observed(hook):
                    act()
            except SpaceError as error:
                failed.append(error.code)
            if not struck:
                break
            assert leftovers(repo) == []
            assert list(target.iterdir()) == []
        assert failed == ["no-space"] * max(5, len(failed))
    assert all(torch.equal(repo.pull("m")[name], tensor) for name, tensor in state.items())


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    repo: ckpt.Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.push({"w": torch.randn(3000)}, "m")
    before = list(repo.location.store.glob("packs/*/*"))
    usage = shutil.disk_usage(repo.location.root)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SpaceError, match=r"needs 11\.7 KiB more and has 1000 B free"):
        repo.push({"w": torch.randn(3000)}, "other", compress="none")
    with pytest.raises(SpaceError, match=r"needs 11\.8 KiB more and has 1000 B free"):
        repo.pull_file("m", tmp_path / "m.safetensors")
    assert list(repo.location.store.glob("packs/*/*")) == before
    assert not (tmp_path / "m.safetensors").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 2 MiB; only root can make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root; the tests above need no disk")
def test_a_push_to_a_real_full_disk_leaves_nothing_and_works_again(small_disk: Path) -> None:
    filler = small_disk / "filler"
    with ckpt.open(small_disk) as repo:
        repo.push({"w": torch.randn(1000)}, "m")
        filler.write_bytes(bytes(1_200_000))
        for _ in range(2):
            with pytest.raises(SpaceError):
                repo.push({"w": torch.randn(200_000)}, "m")
        assert leftovers(repo) == []
        filler.unlink()
        repo.push({"w": torch.randn(200_000)}, "m")
        assert len(repo.log("m")) == 2


AS_OTHER_USER = """
import os, sys
import ckpt
from ckpt.core.errors import AccessError
with ckpt.open(sys.argv[3]) as repo:  # loads everything while the interpreter's own files may be read
    repo.pull_file(repo.push_file(sys.argv[2], "m"), sys.argv[3] + "/out.safetensors")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    with ckpt.open(sys.argv[1]) as repo:
        assert repo.get("m").number == 1
        repo.push_file(sys.argv[2], "m")
except AccessError as error:
    print(error.code, error.exit_code)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_repository_that_may_only_be_read_refuses_a_push(tmp_path: Path) -> None:
    with ckpt.open(tmp_path / "shared") as repo:
        repo.push({"w": torch.ones(3)}, "m")
    save_file({"w": numpy.zeros(3, numpy.float32)}, tmp_path / "new.safetensors")
    before = sorted(str(path) for path in (tmp_path / "shared").rglob("*"))
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    shown = subprocess.run(
        [
            *(sys.executable, "-c", AS_OTHER_USER),
            *(tmp_path / "shared", tmp_path / "new.safetensors", tmp_path / "warm"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.stdout.split() == ["permission", "7"], shown.stderr
    assert sorted(str(path) for path in (tmp_path / "shared").rglob("*")) == before


def test_permission_is_an_access_error(repo: ckpt.Repository) -> None:
    for number in (13, 1, 30):
        with observed(failing("create", number)), pytest.raises(AccessError) as caught:
            repo.push({"w": torch.ones(3)}, "m")
        assert (caught.value.code, caught.value.exit_code) == ("permission", 7)


def test_a_file_that_may_not_be_read_is_an_access_error(
    repo: ckpt.Repository, small_file: Path
) -> None:
    with observed(failing("open", 13)), pytest.raises(AccessError, match=r"small\.safetensors"):
        repo.push_file(small_file, "m")
    assert repo.models() == []


class TestDamagedPacks:
    """A pack that is not what it was is found when it is read, and healed by the next push."""

    STATE = {"w": torch.arange(1000.0)}  # noqa: RUF012  never changed

    def damage(self, pack: Path, how: str) -> None:
        body = bytearray(pack.read_bytes())
        pack.chmod(0o644)
        if how == "flipped":
            body[-1] ^= 1
            pack.write_bytes(body)
        elif how == "cut":
            pack.write_bytes(body[:-10])
        else:
            pack.unlink()

    @pytest.mark.parametrize(
        ("how", "code"),
        [("flipped", "object-corrupt"), ("cut", "object-short"), ("deleted", "object-missing")],
    )
    def test_a_pull_names_version_tensor_and_key(
        self, repo: ckpt.Repository, tmp_path: Path, how: str, code: str
    ) -> None:
        repo.push(self.STATE, "m")
        pack = pack_of(repo)
        self.damage(pack, how)
        target = tmp_path / "out"
        target.mkdir()
        for act in (lambda: repo.pull("m"), lambda: repo.pull_file("m", target / "x.safetensors")):
            with pytest.raises(IntegrityError) as caught:
                act()
            assert caught.value.code == code
            for part in ("m@1", '"w"', pack.name):
                assert part in str(caught.value)
        assert list(target.iterdir()) == []

    @pytest.mark.parametrize("how", ["cut", "deleted"])
    def test_the_next_push_of_that_content_stores_it_again(
        self, repo: ckpt.Repository, how: str
    ) -> None:
        repo.push(self.STATE, "m")
        self.damage(pack_of(repo), how)
        again = repo.push(self.STATE, "m")
        assert again.number == 2
        assert again.new_bytes > 4000
        assert torch.equal(repo.pull(again)["w"], self.STATE["w"])

    def test_any_flipped_byte_of_the_data_is_found(self, repo: ckpt.Repository) -> None:
        repo.push({"w": torch.arange(64, dtype=torch.uint8)}, "m")
        pack = pack_of(repo)
        pack.chmod(0o644)
        whole = pack.read_bytes()
        for at in range(1, 65):
            body = bytearray(whole)
            body[-at] ^= 0x10
            pack.write_bytes(body)
            with pytest.raises(IntegrityError):
                repo.pull("m")
        pack.write_bytes(whole)
        repo.pull("m")


def test_a_damaged_document_is_named(repo: ckpt.Repository) -> None:
    import sqlite3

    import zstandard

    repo.push({"w": torch.ones(3)}, "m")
    with sqlite3.connect(repo.location.registry) as connection:
        ((body,),) = connection.execute("SELECT body FROM structures").fetchall()
        text = zstandard.ZstdDecompressor().decompress(body).replace(b'"state"', b'"stage"')
        packed = zstandard.ZstdCompressor().compress(text)
        connection.execute("UPDATE structures SET body = ?", (packed,))
    connection.close()
    with pytest.raises(IntegrityError) as caught:
        repo.pull("m")
    assert caught.value.code == "document-damaged"


STOPPED_AT = """
import os, signal, sys
from ckpt.cli.main import main
from ckpt.core.effects import observed
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background has none
kind, number = sys.argv.pop(1), int(sys.argv.pop(1))
def hook(found, act, args):
    global kind
    result = act(*args)
    if found == kind:
        kind = None
        os.kill(os.getpid(), number)
    return result
with observed(hook):
    main()
"""


@pytest.mark.parametrize(
    ("kind", "number", "status"),
    [
        ("create", signal.SIGINT, 130),
        ("write", signal.SIGTERM, 143),
        ("fsync", signal.SIGINT, 130),
        ("link", signal.SIGTERM, 143),
        ("sql.commit", signal.SIGINT, 130),
    ],
)
def test_a_signal_at_any_moment_of_a_push_leaves_nothing_behind(
    repo: ckpt.Repository, small_file: Path, kind: str, number: int, status: int
) -> None:
    shown = run("-c", STOPPED_AT, kind, str(int(number)), "push", small_file, "m")
    assert (shown.returncode, shown.stdout) == (status, "")
    assert "safe to run it again" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1
    assert leftovers(repo) == []
    version = repo.push_file(small_file, "m")
    assert version.number == 1
    back = small_file.with_name("back")
    repo.pull_file(version, back)
    assert back.read_bytes() == small_file.read_bytes()


@pytest.mark.parametrize(
    ("closed", "act", "status", "said"),
    [
        ("<&-", "rm", 2, "error[not-confirmed]"),
        (">&-", "push", 0, " new"),
        ("2>&-", "push", 0, "m@2"),
    ],
)
def test_a_stream_that_is_closed_is_no_bug(
    repo: ckpt.Repository, small_file: Path, closed: str, act: str, status: int, said: str
) -> None:
    repo.push({"w": torch.ones(3)}, "m")
    arguments = ["rm", "m"] if act == "rm" else ["push", small_file, "m"]
    shown = run(*arguments, program=["sh", "-c", f'exec "$0" "$@" {closed}', PROGRAM])
    assert shown.returncode == status
    assert said in shown.stdout + shown.stderr
    repo.pull_file("m", small_file.with_name("back"))


@pytest.mark.parametrize(("act", "lines"), [("push", 1), ("ls", 0)])
def test_a_closed_pipe_ends_quietly(
    repo: ckpt.Repository, small_file: Path, act: str, lines: int
) -> None:
    repo.push({"w": torch.ones(3)}, "m")
    read, write = os.pipe()
    os.close(read)
    arguments = ["push", small_file, "m"] if act == "push" else ["ls"]
    shown = run(*arguments, program=[PROGRAM], stdout=write)
    os.close(write)
    assert (shown.returncode, len(shown.stderr.splitlines())) == (141, lines)
    assert "Traceback" not in shown.stderr
    assert leftovers(repo) == []
    assert repo.push_file(small_file, "m").number == 2


def test_a_full_output_is_told_like_any_full_disk(repo: ckpt.Repository, small_file: Path) -> None:
    repo.push({"w": torch.ones(3)}, "m")
    with open("/dev/full", "w") as full:
        shown = run("ls", program=[PROGRAM], stdout=full.fileno())
    assert (shown.returncode, len(shown.stderr.splitlines())) == (8, 1)
    assert shown.stderr.startswith("error[no-space]")


def test_no_traceback_leaves_a_real_process(small_file: Path) -> None:
    for arguments in (["pull", "nix"], ["push", "no", "net"], ["show", "known@b3:1"]):
        shown = run(*arguments, program=[PROGRAM])
        assert shown.returncode in (2, 3)
        assert shown.stderr.startswith("error[")
        assert len(shown.stderr.splitlines()) == 1


def test_a_pack_is_checked_by_size_before_it_is_shared(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(3)}, "m")
    pack = pack_of(repo)
    recorded = Pack(pack.stem, "", pack.stat().st_size, "")
    pack.chmod(0o644)
    pack.write_bytes(pack.read_bytes() + b"x")
    assert pack.stat().st_size == recorded.size + 1
    assert repo.push({"w": torch.ones(3)}, "other").new_bytes > 0


def test_a_body_that_cannot_be_decompressed_is_named(repo: ckpt.Repository) -> None:
    import sqlite3

    repo.push({"w": torch.ones(3)}, "m")
    for table in ("structures", "documents"):
        with sqlite3.connect(repo.location.registry) as connection:
            connection.execute(f"UPDATE {table} SET body = x'00'")
        connection.close()
        with pytest.raises(IntegrityError) as caught:
            repo.pull("m")
        assert caught.value.code == "document-damaged"
