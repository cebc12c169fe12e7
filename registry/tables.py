"""The tables, as ``migrations/`` makes them; a test holds the two equal."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only in a column of exactly this type.
_Id = BigInteger().with_variant(Integer, "sqlite")

# The epoch of a registry that a rebuild has cut off: no epoch begins at it.
CLOSED = 0

# One row. ``next_counter`` numbers the documents and events in the store, and only goes up.
meta = Table(
    "meta",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("store", String(36), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("next_counter", BigInteger, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)

# ``folded`` is the ASCII-lowercase name: names are unique ignoring case. ``next_number`` and
# ``next_event`` only go up; ``version_count`` is kept, since counting reads every version.
models = Table(
    "models",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", String(255), nullable=False, unique=True),
    Column("folded", String(255), nullable=False, unique=True),
    Column("next_number", BigInteger, nullable=False),
    Column("next_event", BigInteger, nullable=False),
    Column("version_count", BigInteger, nullable=False, server_default=text("0")),
)

# ``holder`` is the job that saves under this name now, until its lease ends; ``spared`` are the
# pushes, as JSON, of the versions that it goes on from, which no rule removes until then.
runs = Table(
    "runs",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("model", ForeignKey("models.id"), nullable=False),
    Column("name", String(128), nullable=False),
    Column("holder", String(32)),
    Column("held_until", BigInteger),
    Column("spared", Text),
    UniqueConstraint("model", "name"),
    Index(None, "held_until"),
)

environments = Table(
    "environments",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

# What successive versions share of their documents; zstd, as are the bodies of documents.
structures = Table(
    "structures",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

documents = Table(
    "documents",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("structure", ForeignKey("structures.digest"), nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index(None, "structure"),
)

# A class or function as one push found it; ``digest`` is of the whole record.
model_classes = Table(
    "model_classes",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("reference", Text, nullable=False),
    Column("package", Text),
    Column("version", Text),
    Column("source_digest", String(64)),
    Index(None, "reference"),
)

# ``facts`` is what the push said, for the copy in the store, whatever is labelled later.
# ``structure_digest`` is of the structure without values: what is proven once is known by it.
versions = Table(
    "versions",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("model", ForeignKey("models.id"), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("push", ForeignKey("pushes.id"), nullable=False, unique=True),
    Column("run", ForeignKey("runs.id"), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("document", ForeignKey("documents.digest"), nullable=False),
    Column("environment", ForeignKey("environments.digest"), nullable=False),
    Column("state", String(16), nullable=False),
    Column("step", BigInteger),
    Column("parent", Text),
    Column("message", Text),
    Column("author", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("nbytes", BigInteger, nullable=False),
    Column("new_bytes", BigInteger, nullable=False),
    Column("structure_digest", String(64)),
    Column("proof", String(16)),
    Column("proof_reason", Text),
    Column("sequence", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("counter", BigInteger, nullable=False),
    Column("facts", LargeBinary, nullable=False),
    Column("copied", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("model", "number"),
    Index(None, "model", "digest", "number"),
    Index(None, "run", "number"),
    Index(None, "copied", "counter"),
    Index(None, "model", "step", "number"),
    Index(None, "structure_digest", "proof", "id"),
    Index(None, "document"),
)

# Which version names which class.
class_uses = Table(
    "class_uses",
    metadata,
    Column("version", ForeignKey("versions.id", ondelete="CASCADE"), nullable=False),
    Column("model_class", ForeignKey("model_classes.digest"), nullable=False),
    PrimaryKeyConstraint("version", "model_class"),
    Index(None, "model_class"),
)

# ``value`` is NULL for a metric that is not finite; ``special`` then says which. ``model`` is the
# version's, so that an index has the values of one model side by side.
metrics = Table(
    "metrics",
    metadata,
    Column("version", ForeignKey("versions.id", ondelete="CASCADE"), nullable=False),
    Column("name", String(128), nullable=False),
    Column("value", Float(53)),
    Column("special", String(4)),
    Column("model", ForeignKey("models.id"), nullable=False),
    PrimaryKeyConstraint("version", "name"),
    Index(None, "model", "name", "value", "version"),
)

labels = Table(
    "labels",
    metadata,
    Column("version", ForeignKey("versions.id", ondelete="CASCADE"), nullable=False),
    Column("name", String(128), nullable=False),
    Column("value", Text, nullable=False),
    PrimaryKeyConstraint("version", "name"),
    Index(None, "name", "value"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("model", ForeignKey("models.id"), nullable=False),
    Column("name", String(128), nullable=False),
    Column("version", ForeignKey("versions.id", ondelete="CASCADE"), nullable=False),
    PrimaryKeyConstraint("model", "name"),
    Index(None, "version"),
)

policies = Table(
    "policies",
    metadata,
    Column("model", ForeignKey("models.id"), primary_key=True),
    Column("body", Text, nullable=False),
)

# Append-only: who did what to what. ``counter`` is NULL for what needs no copy in the store.
events = Table(
    "events",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("counter", BigInteger),
    Column("model", ForeignKey("models.id")),
    Column("model_seq", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("author", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("copied", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("epoch", "counter"),
    Index(None, "model", "model_seq"),
    Index(None, "copied", "counter"),
    Index(None, "created_at"),
    Index(None, "kind"),
)

pushes = Table(
    "pushes",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(8), nullable=False),
    Column("state", String(9), nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("version", BigInteger),
    Column("epoch", BigInteger, nullable=False),
    CheckConstraint("state in ('open', 'committed', 'aborted')", name="state"),
    Index(None, "state", "expires_at"),
)

packs = Table(
    "packs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key", Text, nullable=False, unique=True),
    Column("size", BigInteger, nullable=False),
    Column("header", String(64), nullable=False),
    Column("state", String(9), nullable=False),
    Column("condemned_at", BigInteger),
    Column("push", ForeignKey("pushes.id"), nullable=False),
    CheckConstraint("state in ('live', 'condemned', 'broken')", name="state"),
    Index(None, "push"),
)

chunks = Table(
    "chunks",
    metadata,
    Column("digest", String(64), nullable=False),
    Column("pack", ForeignKey("packs.id", ondelete="CASCADE"), nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("length", BigInteger, nullable=False),
    Column("raw_length", BigInteger, nullable=False),
    Column("codec", String(32)),
    Column("base", String(64)),
    PrimaryKeyConstraint("digest", "pack"),
    Index(None, "pack"),
)

refs = Table(
    "refs",
    metadata,
    Column("version", ForeignKey("versions.id", ondelete="CASCADE"), nullable=False),
    Column("pack", ForeignKey("packs.id", ondelete="RESTRICT"), nullable=False),
    PrimaryKeyConstraint("version", "pack"),
    Index(None, "pack"),
)

claims = Table(
    "claims",
    metadata,
    Column("push", ForeignKey("pushes.id", ondelete="RESTRICT"), nullable=False),
    Column("pack", ForeignKey("packs.id", ondelete="RESTRICT"), nullable=False),
    PrimaryKeyConstraint("push", "pack"),
    Index(None, "pack"),
)

dead_keys = Table(
    "dead_keys",
    metadata,
    Column("key", Text, primary_key=True),
    Column("event", ForeignKey("events.id"), nullable=False),
)
