"""What a repository takes from other programs' checkpoints, and gives to them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.core.errors import CkptError, UsageError
from ckpt.core.names import check_alias, check_aliases, check_labels, check_model, check_run
from ckpt.core.names import check_step as checked_step
from ckpt.core.printable import escape
from ckpt.core.records import Version
from ckpt.core.references import parse_reference
from ckpt.registry.registry import Registry
from ckpt.service.acknowledge import acknowledge_event, acknowledge_push
from ckpt.service.author import author
from ckpt.service.config import Location
from ckpt.storage.store import Store
