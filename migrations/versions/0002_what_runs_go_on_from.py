"""Which versions the live runs go on from, so that no rule removes them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("spared", sa.Text(), nullable=True))
    op.create_index(op.f("ix_runs_held_until"), "runs", ["held_until"])
