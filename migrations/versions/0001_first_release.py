"""The tables of the first release."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "environments",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_environments")),
    )
    op.create_table(
        "meta",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("store", sa.String(length=36), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("next_counter", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_meta_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_meta")),
    )
    op.create_table(
        "model_classes",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("reference", sa.Text(), nullable=False),
        sa.Column("package", sa.Text(), nullable=True),
        sa.Column("version", sa.Text(), nullable=True),
        sa.Column("source_digest", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_model_classes")),
    )
    op.create_index(op.f("ix_model_classes_reference"), "model_classes", ["reference"])
    op.create_table(
        "models",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("folded", sa.String(length=255), nullable=False),
        sa.Column("next_number", sa.BigInteger(), nullable=False),
        sa.Column("next_event", sa.BigInteger(), nullable=False),
        sa.Column("version_count", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_models")),
        sa.UniqueConstraint("folded", name=op.f("uq_models_folded")),
        sa.UniqueConstraint("name", name=op.f("uq_models_name")),
    )
    op.create_table(
        "pushes",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("state", sa.String(length=9), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=True),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "state in ('open', 'committed', 'aborted')", name=op.f("ck_pushes_state")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pushes")),
    )
    op.create_index(
        op.f("ix_pushes_state_expires_at"), "pushes", ["state", "expires_at"], unique=False
    )
    op.create_table(
        "structures",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_structures")),
    )
    op.create_table(
        "documents",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("structure", sa.String(length=64), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["structure"], ["structures.digest"], name=op.f("fk_documents_structure")
        ),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_documents")),
    )
    op.create_index(op.f("ix_documents_structure"), "documents", ["structure"])
    op.create_table(
        "events",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("counter", sa.BigInteger(), nullable=True),
        sa.Column("model", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("model_seq", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("copied", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.ForeignKeyConstraint(["model"], ["models.id"], name=op.f("fk_events_model")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        sa.UniqueConstraint("epoch", "counter", name=op.f("uq_events_epoch_counter")),
    )
    op.create_index(
        op.f("ix_events_model_model_seq"), "events", ["model", "model_seq"], unique=False
    )
    op.create_index(op.f("ix_events_copied_counter"), "events", ["copied", "counter"], unique=False)
    op.create_index(op.f("ix_events_created_at"), "events", ["created_at"])
    op.create_index(op.f("ix_events_kind"), "events", ["kind"])
    op.create_table(
        "packs",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("header", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=9), nullable=False),
        sa.Column("condemned_at", sa.BigInteger(), nullable=True),
        sa.Column("push", sa.String(length=32), nullable=False),
        sa.CheckConstraint("state in ('live', 'condemned', 'broken')", name=op.f("ck_packs_state")),
        sa.ForeignKeyConstraint(["push"], ["pushes.id"], name=op.f("fk_packs_push")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_packs")),
        sa.UniqueConstraint("key", name=op.f("uq_packs_key")),
    )
    op.create_index(op.f("ix_packs_push"), "packs", ["push"], unique=False)
    op.create_table(
        "policies",
        sa.Column("model", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["model"], ["models.id"], name=op.f("fk_policies_model")),
        sa.PrimaryKeyConstraint("model", name=op.f("pk_policies")),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("model", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("holder", sa.String(length=32), nullable=True),
        sa.Column("held_until", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["model"], ["models.id"], name=op.f("fk_runs_model")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("model", "name", name=op.f("uq_runs_model_name")),
    )
    op.create_table(
        "chunks",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("pack", sa.String(length=64), nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("length", sa.BigInteger(), nullable=False),
        sa.Column("raw_length", sa.BigInteger(), nullable=False),
        sa.Column("codec", sa.String(length=32), nullable=True),
        sa.Column("base", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(
            ["pack"], ["packs.id"], name=op.f("fk_chunks_pack"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("digest", "pack", name=op.f("pk_chunks")),
    )
    op.create_index(op.f("ix_chunks_pack"), "chunks", ["pack"], unique=False)
    op.create_table(
        "claims",
        sa.Column("push", sa.String(length=32), nullable=False),
        sa.Column("pack", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["pack"], ["packs.id"], name=op.f("fk_claims_pack"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["push"], ["pushes.id"], name=op.f("fk_claims_push"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("push", "pack", name=op.f("pk_claims")),
    )
    op.create_index(op.f("ix_claims_pack"), "claims", ["pack"], unique=False)
    op.create_table(
        "dead_keys",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("event", sa.String(length=32), nullable=False),
        sa.ForeignKeyConstraint(["event"], ["events.id"], name=op.f("fk_dead_keys_event")),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_dead_keys")),
    )
    op.create_table(
        "versions",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("model", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("push", sa.String(length=32), nullable=False),
        sa.Column("run", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("document", sa.String(length=64), nullable=False),
        sa.Column("environment", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("parent", sa.Text(), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("nbytes", sa.BigInteger(), nullable=False),
        sa.Column("new_bytes", sa.BigInteger(), nullable=False),
        sa.Column("structure_digest", sa.String(length=64), nullable=True),
        sa.Column("proof", sa.String(length=16), nullable=True),
        sa.Column("proof_reason", sa.Text(), nullable=True),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("counter", sa.BigInteger(), nullable=False),
        sa.Column("facts", sa.LargeBinary(), nullable=False),
        sa.Column("copied", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.ForeignKeyConstraint(
            ["document"], ["documents.digest"], name=op.f("fk_versions_document")
        ),
        sa.ForeignKeyConstraint(
            ["environment"], ["environments.digest"], name=op.f("fk_versions_environment")
        ),
        sa.ForeignKeyConstraint(["model"], ["models.id"], name=op.f("fk_versions_model")),
        sa.ForeignKeyConstraint(["push"], ["pushes.id"], name=op.f("fk_versions_push")),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name=op.f("fk_versions_run")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_versions")),
        sa.UniqueConstraint("model", "number", name=op.f("uq_versions_model_number")),
        sa.UniqueConstraint("push", name=op.f("uq_versions_push")),
    )
    op.create_index(
        op.f("ix_versions_model_digest_number"), "versions", ["model", "digest", "number"]
    )
    op.create_index(op.f("ix_versions_run_number"), "versions", ["run", "number"], unique=False)
    op.create_index(
        op.f("ix_versions_copied_counter"), "versions", ["copied", "counter"], unique=False
    )
    op.create_index(op.f("ix_versions_model_step_number"), "versions", ["model", "step", "number"])
    op.create_index(
        op.f("ix_versions_structure_digest_proof_id"),
        "versions",
        ["structure_digest", "proof", "id"],
    )
    op.create_index(op.f("ix_versions_document"), "versions", ["document"])
    op.create_table(
        "class_uses",
        sa.Column("version", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("model_class", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_class"], ["model_classes.digest"], name=op.f("fk_class_uses_model_class")
        ),
        sa.ForeignKeyConstraint(
            ["version"], ["versions.id"], name=op.f("fk_class_uses_version"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version", "model_class", name=op.f("pk_class_uses")),
    )
    op.create_index(op.f("ix_class_uses_model_class"), "class_uses", ["model_class"])
    op.create_table(
        "aliases",
        sa.Column("model", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("version", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.ForeignKeyConstraint(["model"], ["models.id"], name=op.f("fk_aliases_model")),
        sa.ForeignKeyConstraint(
            ["version"], ["versions.id"], name=op.f("fk_aliases_version"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("model", "name", name=op.f("pk_aliases")),
    )
    op.create_index(op.f("ix_aliases_version"), "aliases", ["version"], unique=False)
    op.create_table(
        "labels",
        sa.Column("version", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["version"], ["versions.id"], name=op.f("fk_labels_version"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version", "name", name=op.f("pk_labels")),
    )
    op.create_index(op.f("ix_labels_name_value"), "labels", ["name", "value"], unique=False)
    op.create_table(
        "metrics",
        sa.Column("version", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("value", sa.Float(precision=53), nullable=True),
        sa.Column("special", sa.String(length=4), nullable=True),
        sa.Column("model", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.ForeignKeyConstraint(["model"], ["models.id"], name=op.f("fk_metrics_model")),
        sa.ForeignKeyConstraint(
            ["version"], ["versions.id"], name=op.f("fk_metrics_version"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version", "name", name=op.f("pk_metrics")),
    )
    op.create_index(
        op.f("ix_metrics_model_name_value_version"),
        "metrics",
        ["model", "name", "value", "version"],
    )
    op.create_table(
        "refs",
        sa.Column("version", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("pack", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["pack"], ["packs.id"], name=op.f("fk_refs_pack"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["version"], ["versions.id"], name=op.f("fk_refs_version"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version", "pack", name=op.f("pk_refs")),
    )
    op.create_index(op.f("ix_refs_pack"), "refs", ["pack"], unique=False)
