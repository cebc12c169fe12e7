"""The registry at 100,000 versions: what each question takes, beside MLflow on SQLite."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import text

from ckpt.core.digests import digest_of
from ckpt.core.documents import (
    FORMAT,
    Document,
    canonical,
    encode_document,
    split_document,
)
from ckpt.registry.bodies import compress
from ckpt.registry.engine import Transaction

_DOCUMENT = Document(format=FORMAT, state="values", root={}, tensors=(), environment="0" * 64)

# ``h`` are 8 digits that never repeat and are spread as those of a digest are. Of a hundred
# versions in a row, all share the pack of the ``first`` one.
_NUMBERED = """WITH RECURSIVE line(i) AS (
  SELECT 1 UNION ALL SELECT i + 1 FROM line WHERE i < :versions
), spread AS (
  SELECT i, 1 + (i - 1) % :models AS m, 1 + (i - 1) / :models AS k,
    i - (i - 1) / :models % 100 * :models AS first FROM line
), v AS (
  SELECT i, m, k, first, substr(CAST(100000000 + CAST(i AS BIGINT) * 48271 % 100000000 AS TEXT), 2) AS h,
    substr(CAST(100000000 + CAST(first AS BIGINT) * 48271 % 100000000 AS TEXT), 2) AS f FROM spread
)"""
_PUSH, _GONE, _FIRST = (
    "h||'0'||h||h||'0000000'",
    "h||'1'||h||h||'0000000'",
    "f||'0'||f||f||'0000000'",
)
_DIGEST = f"{_PUSH}||{_PUSH}"
_BODY = """'{{"push":"'||{push}||'"}}'"""
_EVENT = "id, kind, epoch, counter, model, model_seq, created_at, author, body, copied"

# What pushes, tags and removals leave behind: table, columns, and what to select from ``v``.
_MADE = (
    ("structures", "digest, body", ":structure, :shared WHERE i = 1"),
    ("environments", "digest, body", ":environment, :empty WHERE i = 1"),
    (
        "models",
        "id, name, folded, next_number, next_event, version_count",
        (
            "m, 'model-'||m, 'model-'||m, 1 + :versions / :models, 1 + 2 * (:versions / :models),"
            " :versions / :models"
            " WHERE k = 1"
        ),
    ),
    ("runs", "id, model, name", "m, m, 'main' WHERE k = 1"),
    ("documents", "digest, structure, body", f"{_DIGEST}, :structure, :own"),
    (
        "pushes",
        "id, kind, state, expires_at, version, epoch",
        f"{_PUSH}, 'push', 'committed', 0, i, 1",
    ),
    (
        "pushes",
        "id, kind, state, expires_at, epoch",
        f"{_GONE}, 'push', 'committed', 0, 1 WHERE i % 100 = 0",
    ),
    (
        "packs",
        "id, key, size, header, state, push",
        f"{_PUSH}||'-0', 'packs/'||{_PUSH}||'-0.safetensors', 1048576, {_DIGEST}, 'live', {_PUSH}",
    ),
    *(
        (
            "chunks",
            'digest, pack, "offset", length, raw_length',
            f"'{part}'||substr({_DIGEST}, 2), {_PUSH}||'-0', {part} * 262144, 262144, 262144",
        )
        for part in range(4)
    ),
    (
        "versions",
        (
            "id, model, number, push, run, digest, document, environment, state, step, parent,"
            " message, author, created_at, nbytes, new_bytes, sequence, epoch, counter, facts, copied"
        ),
        (
            f"i, m, k, {_PUSH}, m, {_DIGEST}, {_DIGEST}, :environment, 'values', 10 * k,"
            " CASE WHEN k > 1 THEN 'model-'||m||'@'||(k - 1) END,"
            " 'lr 3e-4', 'somebody', 1700000000000000 + i, 1048576, 1048576, 2 * k - 1, 1,"
            " 4 * i, :facts, true"
        ),
    ),
    (
        "metrics",
        "version, model, name, value",
        "i, m, 'loss', CAST(h AS DOUBLE PRECISION) / 100000000",
    ),
    ("metrics", "version, model, name, value", "i, m, 'accuracy', k / 1000000.0"),
    ("metrics", "version, model, name, value", "i, m, 'rate', 0.1"),
    ("labels", "version, name, value", "i, 'data', 'set-'||(i % 7)"),
    ("labels", "version, name, value", "i, 'owner', 'team-'||(i % 100)"),
    ("aliases", "model, name, version", "m, 'best-'||k, i WHERE k % 100 = 1"),
    ("refs", "version, pack", f"i, {_PUSH}||'-0'"),
    ("refs", "version, pack", f"i, {_FIRST}||'-0' WHERE first <> i"),
    (
        "events",
        _EVENT,
        (
            f"{_PUSH}, 'push', 1, CAST(NULL AS BIGINT), m, 2 * k - 1, 1700000000000000 + i,"
            " 'somebody', :empty, true"
        ),
    ),
    (
        "events",
        _EVENT,
        (
            "h||'8'||h||h||'0000000', 'tag', 1, 4 * i + 1, m, 2 * k, 1700000000000000 + i, 'somebody',"
            f" BLOB({_BODY.format(push=_PUSH)}) , true WHERE i % 10 = 0"
        ),
    ),
    (
        "events",
        _EVENT,
        (
            "h||'9'||h||h||'0000000', 'rm', 1, 4 * i + 2, m, 0, 1700000000000000 + i, 'somebody',"
            f" BLOB({_BODY.format(push=_GONE)}) , true WHERE i % 100 = 0"
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Filling:
    """How many versions, spread evenly over how many models."""

    versions: int
    models: int = 1


def fill(transaction: Transaction, filling: Filling) -> None:
    """Put versions into an empty registry as pushes would have, by SQL alone: each with three
    metrics, two labels, a pack of its own and one that a hundred share. Every tenth was tagged,
    and after every hundredth push came one whose version was removed since."""
    structure, own = split_document(_DOCUMENT)
    values = {
        "versions": filling.versions,
        "models": filling.models,
        "structure": digest_of(structure),
        "shared": compress(structure),
        "own": compress(own),
        "environment": "0" * 64,
        "empty": canonical({}),
        "facts": canonical({"document_digest": digest_of(encode_document(_DOCUMENT))}),
    }
    on_sqlite = transaction.connection.dialect.name == "sqlite"
    for table, columns, selected in _MADE:
        what, _, where = selected.partition(" WHERE ")
        what = what.replace("BLOB(", "CAST(" if on_sqlite else "convert_to(")
        what = what.replace(") , true", " AS BLOB), true" if on_sqlite else ", 'UTF8'), true")
        query = f"{_NUMBERED} SELECT {what} FROM v" + (f" WHERE {where}" if where else "")
        statement = text(f"INSERT INTO {table} ({columns}) {query}")
        transaction.run(statement, {name: values[name] for name in statement.compile().params})
    transaction.run(text(f"UPDATE meta SET next_counter = {4 * filling.versions + 4}"))
    if not on_sqlite:
        for table in ("models", "runs", "versions"):
            last = f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), max(id)) FROM {table}"
            transaction.run(text(last))
