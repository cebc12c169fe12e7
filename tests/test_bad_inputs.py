"""Every bad input that a person can give on the command line: one line, the right exit code, no
traceback, and nothing stored or left behind."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.numpy import save_file

import ckpt
from ckpt.cli import main as entry
from ckpt.core.errors import UsageError
from ckpt.registry.sqlite import _filesystem_of

Prepare = Callable[[Path], object]
Shell = Callable[..., tuple[int, str, str]]


def header_file(text: bytes, data: int = 0, length: int | None = None) -> Prepare:
    """A file ``bad.safetensors`` with this header, in the folder that the test runs in."""

    def write(folder: Path) -> None:
        first = struct.pack("<Q", len(text) if length is None else length)
        (folder / "bad.safetensors").write_bytes(first + text + bytes(data))

    return write


def raw_file(body: bytes) -> Prepare:
    return lambda folder: (folder / "bad.safetensors").write_bytes(body)


def one(dtype: str, shape: str, start: int, end: int) -> bytes:
    text = f'{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}}}'
    return text.encode()


def two(start: int) -> bytes:
    first = '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    second = f'"b":{{"dtype":"F32","shape":[4],"data_offsets":[{start},{start + 16}]}}'
    return f"{{{first},{second}}}".encode()


def registry(sql: str) -> Prepare:
    def change(folder: Path) -> None:
        with sqlite3.connect(folder / ".ckpt" / "registry.db") as connection:
            connection.execute(sql)
        connection.close()

    return change


def config(text: str) -> Prepare:
    return lambda folder: (folder / ".ckpt" / "config.toml").write_text(text)


def link(folder: Path) -> None:
    (folder / "link.safetensors").symlink_to(folder / "elsewhere")


def linked_store(folder: Path) -> None:
    (folder / ".ckpt" / "store").rename(folder / "elsewhere")
    (folder / ".ckpt" / "store").symlink_to(folder / "elsewhere")


def equal_prefixes(folder: Path) -> None:
    with ckpt.open(folder) as repo:
        repo.push_file(folder / OK, "known", step=2)
    registry("UPDATE versions SET digest = '0123abcd' || printf('%056d', id)")(folder)


def kept(folder: Path) -> None:
    with ckpt.open(folder) as repo:
        repo.tag("known", "kept")


def cut_registry(size: int) -> Prepare:
    return lambda folder: os.truncate(folder / ".ckpt" / "registry.db", size)


def taken(folder: Path) -> None:
    """What the pulled file would be called is a folder, a link, and a pipe."""
    (folder / "d" / "known-1.safetensors").mkdir(parents=True)
    (folder / "l").mkdir()
    (folder / "l" / "known-1.safetensors").symlink_to("gone")
    (folder / "p").mkdir()
    os.mkfifo(folder / "p" / "known-1.safetensors")


def gone(folder: Path) -> None:
    """The working folder is not there any more."""
    (folder / "gone").mkdir()
    os.chdir(folder / "gone")
    (folder / "gone").rmdir()


def bare_folder(folder: Path) -> None:
    """A folder without weights."""
    (folder / "bare").mkdir()


def nothing(folder: Path) -> None:
    """Nothing has to be prepared."""


PUSH = ["push", "bad.safetensors", "net"]
OK = "ok.safetensors"
LONG, BYTES, HUGE = "n" * 300, "k=\udcff", "9" * 20
ROWS: list[tuple[str, Prepare, list[str], int, str, str]] = [
    # name, what is prepared, command, exit code, error code, words of the message
    ("empty file", raw_file(b""), PUSH, 4, "header-short", "0 bytes"),
    ("7 bytes", raw_file(b"1234567"), PUSH, 4, "header-short", "7"),
    ("header 2^63", header_file(b"{}", length=2**63), PUSH, 4, "header-too-large", "16777216"),
    ("header beyond end", header_file(b"{}" * 10, length=512), PUSH, 4, "truncated", "520"),
    ("not UTF-8", header_file(b'{"\xff":1}'), PUSH, 4, "header-encoding", "offset"),
    ("a list", header_file(b"[1, 2]"), PUSH, 4, "header-type", "array"),
    ("duplicate", header_file(b'{"w":1,"w":2}'), PUSH, 4, "duplicate-key", "w"),
    ("NUL padding", header_file(one("F32", "[1]", 0, 4) + b"\0", 4), PUSH, 4, "header-padding", ""),
    ("overlap", header_file(two(8), 32), PUSH, 4, "offset-overlap", "b"),
    ("hole", header_file(two(24), 40), PUSH, 4, "offset-gap", "16"),
    ("trailing", header_file(one("F32", "[1]", 0, 4), 124), PUSH, 4, "trailing-data", "120"),
    ("cut", header_file(one("F32", "[1024]", 0, 4096), 1000), PUSH, 4, "truncated", "4096"),
    ("size", header_file(one("F32", "[2,3]", 0, 20), 20), PUSH, 4, "size-mismatch", "24"),
    ("overflow", header_file(one("F32", f"[{2**40},{2**40}]", 0, 4), 4), PUSH, 4,
     "shape-overflow", "w"),
    ("overflow, empty", header_file(one("F32", f"[0,{2**62},8]", 0, 0)), PUSH, 4,
     "shape-overflow", "w"),
    ("negative", header_file(one("F32", "[-1]", 0, 4), 4), PUSH, 4, "shape-invalid", "-1"),
    ("boolean", header_file(one("F32", "[true]", 0, 4), 4), PUSH, 4, "shape-invalid", ""),
    ("dtype", header_file(one("F128", "[1]", 0, 16), 16), PUSH, 4, "dtype-unknown", "F128"),
    ("rank", header_file(one("U8", str([1] * 70).replace(" ", ""), 0, 1), 1), PUSH, 4,
     "rank-limit", "70"),
    ("deep", header_file(b'{"a":' * 10_000), PUSH, 4, "header-depth", ""),
    ("metadata", header_file(b'{"__metadata__":{"step":1}}'), PUSH, 4, "metadata-type", "step"),
    ("bidi name", header_file(one("F32", "[1]", 0, 4).replace(b'"w"', b'"\\u202e"'), 4), PUSH, 4,
     "name-invalid", "\\u202e"),
    ("newline name", header_file(one("F32", "[1]", 0, 4).replace(b'"w"', b'"a\\nb"'), 4), PUSH, 4,
     "name-invalid", "a\\nb"),
    ("tensors", header_file(b"{" + b'"a":{},' * 2_000_000), PUSH, 4, "tensor-limit", "1000000"),
    ("pipe", lambda f: os.mkfifo(f / "bad.safetensors"), PUSH, 2, "not-a-file", "bad"),
    ("long path", nothing, ["push", LONG, "net"], 6, "io", "too long"),
    ("pickle", raw_file(b"\x80\x02}q\x00." + bytes(40)), PUSH, 4, "not-safetensors", "pickle"),
    ("zip", raw_file(b"PK\x03\x04" + bytes(60)), PUSH, 4, "not-safetensors", ""),
    ("pt", nothing, ["push", "net.pt", "net"], 9, "pickle-refused", "weights_only"),
    ("missing file", nothing, ["push", "no.safetensors", "net"], 3, "not-found", "no.safetensors"),
    ("folder", bare_folder, ["push", "bare", "net"], 2, "no-weights", "folder"),
    *(
        (f"name {name!r}", nothing, ["push", OK, "--", name], 2, "name-invalid", word)
        for name, word in [
            ("../../outside", ""), ("/abs", ""), ("a//b", "empty"), ("..", ""), ("", "empty"),
            ("a%2fb", ""), ("a\\b", ""), ("CON", "reserved"), ("aux.bin", "reserved"),
            ("net.", "dot"), ("n" * 300, "300"), ("-net", ""), ("na me", ""), ("é", ""),
            ("a\nb", "hidden"), ("a\u202eb", "hidden"),
        ]
    ),
    ("case clash", nothing, ["push", OK, "KNOWN"], 5, "name-clash", "known"),
    ("alias number", nothing, ["push", OK, "net:v3"], 2, "name-invalid", "number"),
    ("alias latest", nothing, ["tag", "known", "latest"], 2, "name-invalid", "newest"),
    ("alias empty", nothing, ["push", OK, "net:"], 2, "name-invalid", "empty"),
    ("metric", nothing, ["push", OK, "net", "--metric", "loss=low"], 2, "metric-invalid", "loss"),
    ("metric name", nothing, ["push", OK, "net", "--metric", "a b=1"], 2, "name-invalid", "a b"),
    ("metric step", nothing, ["push", OK, "net", "--metric", "step=5"], 2, "name-invalid", "step"),
    ("no =", nothing, ["push", OK, "net", "--label", "x"], 2, "usage", "="),
    ("step", nothing, ["push", OK, "net", "--step", "-1"], 2, "step-invalid", "-1"),
    ("step text", nothing, ["push", OK, "net", "--step", "x"], 2, "usage", "step"),
    ("label text", nothing, ["push", OK, "net", "--label", BYTES], 2, "text-invalid", "udcff"),
    ("message", nothing, ["push", OK, "net", "-m", BYTES], 2, "text-invalid", "message"),
    ("relabel text", nothing, ["label", "known", BYTES], 2, "text-invalid", "udcff"),
    ("relabel key", nothing, ["label", "known", "a b=c"], 2, "name-invalid", "a b"),
    ("relabel remove", nothing, ["label", "known", "--remove", BYTES], 2, "name-invalid", "udcff"),
    ("relabel nothing", nothing, ["label", "known"], 2, "usage", "nothing"),
    ("run", nothing, ["push", OK, "net", "--run", "a/b"], 2, "name-invalid", "run"),
    ("parent", nothing, ["push", OK, "net", "--parent", "no"], 3, "model-missing", "no"),
    ("digest short", nothing, ["show", "known@b3:0123"], 2, "digest-invalid", "hex"),
    ("digest upper", nothing, ["show", "known@b3:0123ABCD"], 2, "digest-invalid", "hex"),
    ("digest slash", nothing, ["show", "known@b3:0123/abc"], 2, "digest-invalid", "hex"),
    ("digest long", nothing, ["show", "known@b3:" + "a" * 65], 2, "digest-invalid", "hex"),
    ("digest of none", nothing, ["show", "known@b3:" + "a" * 63], 3, "version-missing", "known"),
    ("ambiguous", equal_prefixes, ["show", "known@b3:0123abcd"], 2, "ambiguous", "2 matches"),
    ("other digits", nothing, ["show", "known@\u0661"], 2, "reference-invalid", "name@3"),
    ("no parent", nothing, ["show", "known~1"], 3, "version-missing", "no parent"),
    ("reference", nothing, ["show", "known@best"], 2, "reference-invalid", "name@3"),
    ("no model", nothing, ["pull", "nix"], 3, "model-missing", "nix"),
    ("no version", nothing, ["pull", "known@99"], 3, "version-missing", "known@99"),
    ("no alias", nothing, ["pull", "known:nix"], 3, "alias-missing", "nix"),
    ("exists", nothing, ["pull", "known", OK], 5, "exists", "--force"),
    ("a pickle's name", nothing, ["pull", "known", "out.pt"], 2, "pickle-name", "ckpt export"),
    ("some in a pickle", nothing, ["pull", "known", "o.ckpt", "--tensors", "*"], 2,
     "pickle-name", "ckpt export"),
    ("no folder", nothing, ["pull", "known", "nowhere/"], 3, "no-folder", "nowhere"),
    ("one pattern of two", nothing, ["pull", "known", "--tensors", "*", "--tensors", "x*"], 3,
     "tensor-missing", "x*"),
    ("symlink", link, ["pull", "known", "link.safetensors"], 9, "symlink", "link"),
    ("symlink forced", link, ["pull", "-f", "known", "link.safetensors"], 9, "symlink", "link"),
    ("symlink in a folder", taken, ["pull", "known", "l"], 9, "symlink", "l/known-1"),
    ("folder forced", taken, ["pull", "-f", "known", "d"], 5, "exists", "not a file"),
    ("pipe forced", taken, ["pull", "-f", "known", "p"], 5, "exists", "not a file"),
    ("long destination", nothing, ["pull", "known", LONG], 6, "io", "too long"),
    ("packs gone", lambda f: shutil.rmtree(f / ".ckpt/store/packs"), ["pull", "known", "out"], 4, "object-missing", 'known@1, tensor "w"'),
    ("rm unasked", nothing, ["rm", "known"], 2, "not-confirmed", "--yes"),
    ("rm kept", kept, ["rm", "-y", "known"], 5, "aliased", "ckpt untag known:kept"),
    ("rm in part", nothing, ["rm", "-y", "known", "known@9"], 3, "version-missing", "known@9"),
    ("log none", nothing, ["log", "known", "-n", "0"], 2, "usage", "--number"),
    ("log before", nothing, ["log", "known", "--before", HUGE], 2, "usage", "--before"),
    ("step huge", nothing, ["push", OK, "net", "--step", HUGE], 2, "step-invalid", HUGE),
    ("no folder", nothing, ["pull", "known", "no/x.safetensors"], 3, "no-folder", "no"),
    ("untag", nothing, ["untag", "known@1"], 2, "reference-invalid", "model:alias"),
    ("expect", nothing, ["tag", "known", "a", "--expect", "known"], 5, "alias-moved", "nothing"),
    ("expect text", nothing, ["tag", "known", "a", "--expect", "known@x"], 2,
     "reference-invalid", "known@x"),
    ("no subcommand", nothing, ["db", "frobnicate"], 2, "usage", "ckpt db --help"),
    ("no command", nothing, ["frobnicate"], 2, "usage", "frobnicate"),
    ("no option", nothing, ["ls", "--frobnicate"], 2, "usage", "frobnicate"),
    ("no argument", nothing, ["push"], 2, "usage", "PATH"),
    *(
        (f"uri {uri}", nothing, ["-r", uri, "ls"], 2, "uri-refused", word)
        for uri, word in [
            ("http://169.254.169.254/", "http"), ("file:///etc", "file"), ("ftp://x/y", "ftp"),
            ("s3://user:secret@bucket", "s3"),
        ]
    ),
    ("path for a server", nothing, ["init", "new", "--store", "../else"], 2, "uri-refused", ""),
    ("password written down", nothing,
     ["init", "new", "--registry", "postgresql://me:hunter2@host/db"], 2, "password-refused",
     "PGPASSWORD"),
    ("password in a query", nothing,
     ["init", "new", "--registry", "postgresql://host/db?password=hunter2"], 2,
     "password-refused", "PGPASSWORD"),
    ("uri of init", nothing, ["init", "http://x"], 2, "uri-refused", "http"),
    ("long repository", nothing, ["-r", LONG, "ls"], 6, "io", "too long"),
    ("working folder", gone, ["ls"], 3, "not-found", "upwards"),
    ("no repository", nothing, ["-r", "nowhere", "ls"], 3, "no-repository", "nowhere"),
    ("newer schema", registry("UPDATE alembic_version SET version_num='9999'"), ["ls"], 6,
     "schema-newer", "pip install"),
    ("no tables", registry("DROP TABLE alembic_version"), ["ls"], 6, "registry-corrupt", "rebuild"),
    ("no database", lambda f: (f / ".ckpt/registry.db").write_bytes(b"x" * 9000), ["ls"],
     6, "registry-corrupt", "rebuild"),
    ("empty registry", cut_registry(0), ["ls"], 6, "registry-corrupt", "rebuild"),
    ("cut registry", cut_registry(9000), ["ls"], 6, "registry-corrupt", "rebuild"),
    ("registry missing", lambda f: (f / ".ckpt/registry.db").unlink(), ["push", OK, "net"], 6,
     "registry-missing", "rebuild"),
    ("store missing", lambda f: shutil.rmtree(f / ".ckpt/store"), ["ls"], 6, "store-missing", ""),
    ("format damaged", lambda f: replace(f / ".ckpt/store/FORMAT", b"{"), ["ls"], 4,
     "store-damaged", "FORMAT"),
    ("format newer", lambda f: replace(f / ".ckpt/store/FORMAT", json.dumps(
        {"format": 2, "store": "00000000-0000-4000-8000-000000000000"}).encode()), ["ls"], 4,
     "store-format", "pip install"),
    ("foreign store", lambda f: replace(f / ".ckpt/store/FORMAT", json.dumps(
        {"format": 1, "store": "00000000-0000-4000-8000-000000000000"}).encode()), ["ls"], 4,
     "foreign-store", ""),
    ("config outside", config('store = "../../elsewhere"'), ["ls"], 9, "config-outside", "--repo"),
    ("config absolute", config('registry = "/tmp/x.db"'), ["ls"], 9, "config-outside", "--repo"),
    ("config remote", config('store = "s3://bucket"'), ["ls"], 9, "config-remote", "config.toml"),
    ("config named remote", config('store = "http://x"'), ["-r", ".", "ls"], 2, "uri-refused",
     "http"),
    ("config link", linked_store, ["ls"], 9, "config-outside", "--repo"),
    ("config number", config("store = 3"), ["ls"], 4, "config-damaged", "store"),
    ("config empty", config('store = ""'), ["ls"], 2, "path-invalid", "config.toml"),
    ("config bytes", lambda f: replace(f / ".ckpt/config.toml", b"\xff"), ["ls"], 4,
     "config-damaged", "config.toml"),
    ("config unknown", config('hook = "x"'), ["ls"], 4, "config-damaged", "hook"),
    ("config gone", lambda f: (f / ".ckpt/config.toml").unlink(), ["ls"], 4, "config-damaged",
     "ckpt init"),
    ("empty repository", nothing, ["-r", "", "ls"], 2, "path-invalid", ""),
    ("config broken", config("store = "), ["ls"], 4, "config-damaged", "config.toml"),
]  # fmt: skip


def replace(path: Path, body: bytes) -> None:
    path.unlink()
    path.write_bytes(body)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a repository in which one model lies, and a good file."""
    folder = tmp_path_factory.mktemp("template")
    save_file({"w": numpy.arange(4, dtype=numpy.float32)}, folder / OK)
    with ckpt.open(folder) as repo:
        repo.push_file(folder / OK, "known")
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copied = tmp_path / "work"
    shutil.copytree(template, copied)
    monkeypatch.chdir(copied)
    monkeypatch.delenv("CKPT_REPO", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(copied / "home"))
    monkeypatch.setattr("signal.signal", lambda *given: None)
    return copied


@pytest.fixture
def shell(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    """Runs commands in this process and in the folder: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ckpt", *arguments])
        with pytest.raises(SystemExit) as stop:
            entry.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("prepare", "arguments", "status", "code", "words"),
    [row[1:] for row in ROWS],
    ids=[row[0] for row in ROWS],
)
def test_a_bad_input_gets_one_clear_line_and_leaves_nothing(
    folder: Path,
    shell: Shell,
    prepare: Prepare,
    arguments: list[str],
    status: int,
    code: str,
    words: str,
) -> None:
    prepare(folder)
    before = tree(folder)
    found, out, err = shell(*arguments)
    assert (found, out) == (status, ""), err
    (line,) = err.splitlines()
    assert line.startswith(f"error[{code}]: ")
    assert words in line
    assert tree(folder) == before


def test_a_repository_of_another_user_is_not_followed(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 4242)
    status, _, err = shell("ls")
    assert (status, "config-owner" in err) == (9, True)
    assert shell("-r", ".", "ls")[0] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
@pytest.mark.parametrize("given", ["folder", "file", "link"])
def test_what_another_user_may_change_is_not_followed(
    folder: Path, shell: Shell, given: str
) -> None:
    root, file = folder / ".ckpt", folder / ".ckpt" / "config.toml"
    if given == "link":
        file.rename(folder / "mine.toml")
        file.symlink_to(folder / "mine.toml")
    os.chown(root if given == "folder" else file, 65534, -1, follow_symlinks=False)
    status, _, err = shell("ls")
    assert (status, "config-owner" in err) == (9, True)
    assert shell("-r", ".", "ls")[0] == 0


def test_a_configuration_that_is_named_may_name_other_places(folder: Path, shell: Shell) -> None:
    (folder / ".ckpt" / "store").rename(folder / "elsewhere")
    config('store = "../elsewhere"')(folder)
    assert shell("ls")[0] == 9
    assert "known@1" in shell("-r", ".", "ls")[1]


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "lustre"])
def test_a_network_filesystem_is_refused(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("ckpt.registry.sqlite._filesystem_of", lambda path: kind)
    status, _, err = shell("ls")
    assert status == 6
    assert err.startswith("error[registry-filesystem]: ")
    assert "PostgreSQL" in err


@pytest.mark.parametrize("name", ["größe", "a b", "back\\slash", "form\ffeed", "no\udcffutf8"])
def test_a_network_filesystem_is_known_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    said = str(tmp_path / name).replace("\\", "\\134").replace(" ", "\\040")
    mounts = tmp_path / "mountinfo"
    line = "36 35 98:0 / {} rw,noatime master:1 - {} host:/x rw\n"
    body = line.format("/", "ext4") + line.format(said, "nfs4")
    mounts.write_bytes(os.fsencode(body))
    monkeypatch.setattr("ckpt.registry.sqlite._MOUNTS", mounts)
    assert _filesystem_of(tmp_path / name / "registry.db") == "nfs4"
    assert _filesystem_of(tmp_path / "registry.db") == "ext4"


def test_a_push_that_is_repeated_after_success_is_answered(folder: Path, shell: Shell) -> None:
    before = tree(folder / ".ckpt" / "store")
    status, out, err = shell("push", OK, "known")
    assert (status, out) == (0, "known@1\n")
    assert "already committed" in err
    assert tree(folder / ".ckpt" / "store") == before


def test_from_python_a_time_is_taken_as_a_person_writes_it(repo: ckpt.Repository) -> None:
    repo.gc(grace="7d")
    for grace in ("soon", "999999999w", math.nan, math.inf, -1, 1e300, None):
        with pytest.raises(UsageError) as caught:
            repo.gc(grace=grace)  # type: ignore[arg-type]
        assert caught.value.code == "duration-invalid"


def test_from_python_what_happened_ages_ago_is_all_that_happened(repo: ckpt.Repository) -> None:
    repo.tag(repo.push({"w": torch.ones(1)}, "m"), "best")
    assert repo.events(since="999999999w") == repo.events() != []


def test_from_python_a_run_ends_within_a_time_that_ends(repo: ckpt.Repository) -> None:
    with pytest.raises(UsageError) as caught:
        ckpt.Run(repo, "m", drain_seconds=math.inf)
    assert caught.value.code == "duration-invalid"


@pytest.mark.parametrize("wrong", [-1, 0, 1.5, True, 1 << 63, "all"])
def test_from_python_a_list_ends_where_a_whole_number_says(
    repo: ckpt.Repository, wrong: Any
) -> None:
    repo.push({"w": torch.ones(1)}, "m")
    acts: list[Callable[[], object]] = [
        lambda: repo.log("m", limit=wrong),
        lambda: repo.log("m", before=wrong),
        lambda: repo.find("m", limit=wrong),
        lambda: repo.events(limit=wrong),
    ]
    codes = []
    for act in acts:
        with pytest.raises(UsageError) as caught:
            act()
        codes.append(caught.value.code)
    assert codes == ["limit-invalid", "before-invalid", "limit-invalid", "limit-invalid"]


def test_from_python_a_name_that_no_pack_has_room_for_is_refused(repo: ckpt.Repository) -> None:
    with pytest.raises(UsageError, match="8 MiB") as caught:
        repo.push({"x" * 5_000_000: torch.ones(1)}, "m")
    assert caught.value.code == "name-too-long"
    assert repo.models() == []
    long = "x" * 3_000_000
    repo.push({long: torch.ones(1)}, "m")
    assert [*repo.pull("m")] == [long]


def test_from_python_a_path_is_no_state(repo: ckpt.Repository, tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").touch()
    for path in (tmp_path / "net.safetensors", str(tmp_path), tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="push_file"):
            repo.push(path, "m")
    assert repo.models() == []


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"message": b"fix"}, "text-invalid"),
        ({"message": "fi\0x"}, "text-invalid"),
        ({"labels": {"k": "\0"}}, "text-invalid"),
        ({"parent": 3}, "reference-invalid"),
        ({"run": 3}, "name-invalid"),
        ({"model": None}, "name-invalid"),
        ({"metrics": [1.0]}, "metric-invalid"),
        ({"alias": [3]}, "name-invalid"),
    ],
)
def test_from_python_what_is_of_another_type_is_refused_by_name(
    repo: ckpt.Repository, wrong: dict[str, Any], code: str
) -> None:
    with pytest.raises(UsageError) as caught:
        repo.push(**{"state": {"w": torch.ones(1)}, "model": "m", **wrong})
    assert caught.value.code == code
    assert repo.models() == []


def test_hostile_text_is_taken_as_text_and_shown_escaped(folder: Path, shell: Shell) -> None:
    evil = "<script>\x1b[31m\u202e"
    arrays = {"w": numpy.zeros(1, numpy.float32)}
    save_file(arrays, folder / "evil.safetensors", metadata={evil: evil})
    for arguments in (
        ["push", "evil.safetensors", "net", "-m", evil, "--label", f"k={evil}"],
        *(["show", "net"], ["log", "net"], ["ls"], ["init"]),
        *(["show", evil], ["pull", f"net:{evil}"], ["push", evil, "net"], [evil]),
    ):
        said = "".join(shell("-r", evil, *arguments)[1:])
        assert "\x1b" not in said, arguments
        assert "\u202e" not in said, arguments
    assert shell("-r", evil, "pull", "net", "back")[0] == 0
    assert (folder / "back").read_bytes() == (folder / "evil.safetensors").read_bytes()
