"""What an S3 server really does, found out by small objects that are removed again."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from zlib_ng import zlib_ng

from ckpt.core.errors import AccessError
from ckpt.storage.s3_failures import RefusedError, UnfaithfulError, repeat

if TYPE_CHECKING:
    from ckpt.storage.s3 import S3Store

HIDDEN = ".tmp/"  # the objects of a probe lie below it; they are never listed

_BODY = b"0123456789"
_NO = frozenset({400, 404, 405, 409, 412, 501})


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server was seen to do. Without conditions, or its lists in order, the store takes a
    longer way; ranges and parts it needs."""

    conditional_writes: bool  # never overwrites when told so, at a put and at a Complete
    range_reads: bool
    start_after: bool  # lists by the bytes of the keys, from any key on
    multipart: bool
    checksums: bool  # refuses a body whose CRC-32 is another than was said

    @classmethod
    def named(cls, names: Collection[str]) -> Self:
        """Those with these names, and no others."""
        return cls(**{field.name: field.name in names for field in fields(cls)})

    @property
    def names(self) -> tuple[str, ...]:
        """What the server does, by name."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name))

    @property
    def missing(self) -> tuple[str, ...]:
        """What it does not do, and a store cannot be without."""
        return tuple(name for name in ("range_reads", "multipart") if not getattr(self, name))


EVERYTHING = Capabilities(True, True, True, True, True)


def crc_of(body: bytes | bytearray) -> str:
    """The CRC-32 of a body as a header has it; zlib-ng takes a tenth of zlib's time."""
    return base64.b64encode(zlib_ng.crc32(body).to_bytes(4)).decode()


class Probe:
    """One round of questions to the server of ``store``."""

    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._doing = store.place("trying what the server does")
        self._folder = store.full(f"{HIDDEN}{secrets.token_hex(8)}/")
        # In the order of their bytes; a server that keeps folders puts the last one first.
        self._names = [f"{self._folder}{name}" for name in ("a-b", "a.b", "a/b")]
        self._parted = f"{self._folder}parted"

    def run(self) -> Capabilities:
        """Ask everything.

        Raises:
            NotFoundError: ``no-bucket``.
            AccessError, StorageError: the server refuses or fails what every store needs.
        """
        try:
            for name in self._names:
                self._must("put", "put_object", Key=name, Body=_BODY)
            self._check_size()
            parted = self._parted_upload({})
            refuses = self._refuses_to_overwrite()
            return Capabilities(
                conditional_writes=refuses and (not parted or self._refuses_parted()),
                range_reads=self._reads_ranges(),
                start_after=self._lists_in_order(),
                multipart=parted,
                checksums=self.refuses_wrong_checksum(),
            )
        finally:
            for name in (*self._names, self._parted):
                self._ask("delete", "delete_object", Key=name)

    def _ask(self, kind: str, operation: str, **arguments: Any) -> Mapping[str, Any] | None:
        """The answer, or None where the server says no."""

        def act() -> Mapping[str, Any] | None:
            try:
                return self._store.request(kind, operation, **arguments)
            except RefusedError as refusal:
                if refusal.status in _NO and refusal.code != "NoSuchBucket":
                    return None
                raise

        return repeat(self._doing, act)

    def _must(self, kind: str, operation: str, **arguments: Any) -> Mapping[str, Any]:
        return repeat(self._doing, lambda: self._store.request(kind, operation, **arguments))

    def _check_size(self) -> None:
        found = self._must("head", "head_object", Key=self._names[0])["ContentLength"]
        if found != len(_BODY):
            said = f"{found} bytes are stored of {len(_BODY)} that were sent"
            raise UnfaithfulError(said).typed(self._doing)

    def _refuses_to_overwrite(self) -> bool:
        other = self._ask(
            "put", "put_object", Key=self._names[0], Body=_BODY[::-1], IfNoneMatch="*"
        )
        fresh = f"{self._folder}fresh"
        takes = self._ask("put", "put_object", Key=fresh, Body=_BODY, IfNoneMatch="*")
        self._ask("delete", "delete_object", Key=fresh)
        return other is None and takes is not None

    def keeps_deleted(self) -> bool | None:
        """Whether the bucket keeps what is deleted for ever; None where that may not be asked."""
        try:
            versions = self._ask("versions", "get_bucket_versioning")
            if versions is None or versions.get("Status") != "Enabled":
                return False
            ends = self._ask("lifecycle", "get_bucket_lifecycle_configuration") or {}
        except AccessError:  # a right of its own, which nothing else needs
            return None
        return not any("NoncurrentVersionExpiration" in rule for rule in ends.get("Rules", ()))

    def refuses_wrong_checksum(self) -> bool:
        """Whether a body that was changed on its way is refused, and one that was not is taken."""
        name = f"{self._folder}checked"
        right, wrong = ({"ChecksumCRC32": crc_of(body)} for body in (_BODY, _BODY[::-1]))
        try:
            if self._ask("put", "put_object", Key=name, Body=_BODY, **wrong) is not None:
                return False
            return self._ask("put", "put_object", Key=name, Body=_BODY, **right) is not None
        finally:
            self._ask("delete", "delete_object", Key=name)

    def _refuses_parted(self) -> bool:
        return not self._parted_upload({"IfNoneMatch": "*"})

    def _parted_upload(self, condition: Mapping[str, str]) -> bool:
        """Whether an object can be written in parts under this condition."""
        begun = self._ask("begin", "create_multipart_upload", Key=self._parted)
        if begun is None:
            return False
        upload = {"Key": self._parted, "UploadId": begun["UploadId"]}
        part = self._ask("upload_part", "upload_part", PartNumber=1, Body=_BODY, **upload)
        if part is not None:
            parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
            done = self._ask(
                "complete",
                "complete_multipart_upload",
                MultipartUpload=parts,
                **upload,
                **condition,
            )
            if done is not None:
                return True
        self._ask("abort", "abort_multipart_upload", **upload)
        return False

    def _reads_ranges(self) -> bool:
        answer = self._ask("get", "get_object", Key=self._names[1], Range="bytes=2-5")
        if answer is None:
            return False
        answer["Body"].close()
        found = answer.get("ContentRange"), answer["ContentLength"]
        return bool(found == (f"bytes 2-5/{len(_BODY)}", 4))

    def _lists_in_order(self) -> bool:
        starts = (self._folder, f"{self._folder}a-", self._names[0], self._names[1])
        wanted = (self._names, self._names, self._names[1:], self._names[2:])
        return all(self._list(start) == names for start, names in zip(starts, wanted, strict=True))

    def _list(self, start: str) -> list[str]:
        """The keys of the probe after ``start``, asked for one at a time."""
        found: list[str] = []
        page = {"Prefix": f"{self._folder}a", "StartAfter": start, "MaxKeys": 1}
        while len(found) <= len(self._names):
            answer = self._must("list", "list_objects_v2", **page)
            found += [entry["Key"] for entry in answer.get("Contents", ())]
            if not answer.get("IsTruncated"):
                break
            page["ContinuationToken"] = answer["NextContinuationToken"]
        return found
