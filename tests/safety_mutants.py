"""ckpt with one step of safety left out: exact text of one function, and what stands there instead.

A function keeps its identity and gets other code, so that every caller meets the mutant. The text
must occur exactly once in the function: a change of it breaks the mutant, loudly.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """``function`` is ``module:qualified name``; ``promise`` names the check that must fail."""

    name: str
    promise: str
    function: str
    text: str
    instead: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        """ckpt is this mutant meanwhile."""
        function = _find(self.function)
        kept, function.__code__ = function.__code__, self._code(function)
        try:
            yield
        finally:
            function.__code__ = kept

    def _code(self, function: FunctionType) -> CodeType:
        lines, first = inspect.getsourcelines(function)
        source = "".join(lines)
        assert source.count(self.text) == 1, f"{self.name}: the text is not there exactly once"
        path = Path(inspect.getsourcefile(function) or "")
        whole = path.read_text().splitlines(keepends=True)
        whole[first - 1 : first - 1 + len(lines)] = [source.replace(self.text, self.instead)]
        compiled = compile("".join(whole), str(path), "exec", dont_inherit=True)
        (found,) = _named(compiled, function.__code__.co_qualname)
        return found


def _find(where: str) -> FunctionType:
    module, _, name = where.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    found = inspect.unwrap(found)
    assert isinstance(found, FunctionType)
    return found


def _named(code: CodeType, name: str) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_qualname == name:
                yield constant
            yield from _named(constant, name)


_BOOKS = "ckpt.registry.books:Books."
_COLLECTOR = "ckpt.registry.collect:Collector."
_COMMIT = "ckpt.registry.commit:commit_push"
_LOCAL = "ckpt.storage.local:"
_REBUILD = "ckpt.registry.rebuild:_Rebuild."

_SWEEP_STATES = """\
        query = select(pushes).where(pushes.c.id.in_(sorted(set(creators.values()))))
        states = {row.id: row.state for row in transaction.rows(query.with_for_update(read=True))}
        over ="""
_SWEEP_ROWS_FIRST = """\
        transaction.rows(select(packs.c.key).where(packs.c.key.in_(some)))
        query = select(pushes).where(pushes.c.id.in_(sorted(set(creators.values()))))
        states = {row.id: row.state for row in transaction.rows(query)}
        over ="""

# Of each kind of defence one; these five are tried in every ordinary run.
TELLING = (
    Mutant(
        "commit without asking for its packs again",
        "a_commit_refuses_a_pack_that_is_gone",
        _COMMIT,
        "    _check_packs(transaction, needed, finished)\n",
        "",
    ),
    Mutant(
        "a collection that does not look at claims",
        "a_claimed_pack_survives_a_collection",
        "ckpt.registry.collect:_needed",
        "referred | exists().where(claims.c.pack == packs.c.id)",
        "referred",
    ),
    Mutant(
        "DELETE before the event is in the store",
        "no_delete_before_the_dead_event_is_in_the_store",
        "ckpt.service.gc:_delete",
        "registry.copies.is_copied(dead.event) and ",
        "",
    ),
    Mutant(
        "acknowledged without asking the registry again",
        "a_push_into_a_lost_registry_is_not_acknowledged",
        "ckpt.service.acknowledge:acknowledge_push",
        "if version is None:",
        "if False:",
    ),
    Mutant(
        "no fsync of a pack",
        "a_push_survives_the_loss_of_power",
        _LOCAL + "_LocalUpload.link",
        'perform("fsync", os.fsync, self._handle)',
        "pass",
    ),
)

OTHERS = (
    Mutant(
        "commit of a push that is not open",
        "a_commit_refuses_a_push_that_is_not_open",
        _COMMIT,
        "    require_open(transaction, push, shared=False)\n",
        "",
    ),
    Mutant(
        "commit without looking whether all can be read",
        "a_commit_refuses_what_can_not_be_read",
        _COMMIT,
        "    _check_decodable(transaction, document, needed, finished)\n",
        "",
    ),
    Mutant(
        "commit of condemned packs",
        "a_commit_refuses_a_condemned_pack",
        "ckpt.registry.commit:_check_packs",
        "for pack in found if pack.state is PackState.LIVE",
        "for pack in found",
    ),
    Mutant(
        "commit that forgets its claims",
        "a_push_that_ended_has_no_claims",
        _COMMIT,
        "    transaction.run(delete(claims).where(claims.c.push == push))\n",
        "",
    ),
    Mutant(
        "commit that refers only to its own packs",
        "a_version_keeps_the_packs_that_it_shares",
        _COMMIT,
        '"pack": p} for p in sorted(needed)]',
        '"pack": p} for p in sorted(needed) if p.startswith(push)]',
    ),
    Mutant(
        "numbers counted anew",
        "a_number_never_comes_back",
        _COMMIT,
        '        "number": model.next_number,\n',
        '        "number": 1 + len(transaction.rows(\n'
        "            select(versions.c.id).where(versions.c.model == model.id))),\n",
    ),
    Mutant(
        "a claim of a push that is not open",
        "only_an_open_push_can_claim",
        _BOOKS + "_claim",
        "            require_open(transaction, push, shared=True)\n",
        "",
    ),
    Mutant(
        "rows of a push that is not open",
        "only_an_open_push_can_register_a_pack",
        _BOOKS + "register",
        "            require_open(transaction, push, shared=True)\n",
        "",
    ),
    Mutant(
        "a pack's own row without a claim",
        "a_registered_pack_is_claimed",
        _BOOKS + "register",
        '            transaction.run(insert(claims), {"push": push, "pack": finished.pack.id})\n',
        "",
    ),
    Mutant(
        "claims that are not written down",
        "a_claimed_pack_survives_a_collection",
        _BOOKS + "_claim",
        "            self._note_claims(transaction, push, [pack.id for pack in good])\n",
        "",
    ),
    Mutant(
        "a condemned pack is not rescued",
        "a_condemned_pack_is_rescued",
        _BOOKS + "_claim",
        "in batches(condemned):",
        "in batches([]):",
    ),
    Mutant(
        "a rescue without the exclusive lock",
        "a_rescue_holds_the_exclusive_lock",
        _BOOKS + "_claim",
        "if condemned and not exclusive:",
        "if False:",
    ),
    Mutant(
        "broken packs are claimed",
        "a_broken_pack_is_not_claimed",
        _BOOKS + "_claim",
        "[pack for pack in found if pack.state is not PackState.BROKEN]",
        "found",
    ),
    Mutant(
        "no look at the size after a claim",
        "a_damaged_pack_is_not_shared",
        "ckpt.service.sharing:Sharing._try",
        "if size == pack.size:",
        "if True:",
    ),
    Mutant(
        "an abort that removes the packs of the push",
        "an_abort_leaves_finished_packs",
        _BOOKS + "abort",
        "                transaction.run(delete(claims).where(claims.c.push == push))\n",
        "                transaction.run(delete(claims).where(claims.c.push == push))\n"
        "                transaction.run(delete(packs).where(packs.c.push == push))\n",
    ),
    Mutant(
        "an abort that keeps its claims",
        "a_push_that_ended_has_no_claims",
        _BOOKS + "abort",
        "                transaction.run(delete(claims).where(claims.c.push == push))\n",
        "",
    ),
    Mutant(
        "a collection that does not look at references",
        "a_removal_looks_again_under_the_lock",
        "ckpt.registry.collect:_needed",
        "referred = exists().where(refs.c.pack == packs.c.id)",
        "referred = exists().where(packs.c.id.is_(None))",
    ),
    Mutant(
        "rows removed without looking again",
        "a_removal_looks_again_under_the_lock",
        _COLLECTOR + "_remove",
        "packs.c.id.in_(locked), ~_needed()",
        "packs.c.id.in_(locked)",
    ),
    Mutant(
        "rows removed without a lock",
        "a_removal_looks_again_under_the_lock",
        _COLLECTOR + "_remove",
        "query.with_for_update(skip_locked=True)",
        "query",
    ),
    Mutant(
        "a needed pack is condemned",
        "a_needed_pack_is_not_condemned",
        _COLLECTOR + "_condemn",
        "packs.c.id.in_(locked), ~_needed()",
        "packs.c.id.in_(locked)",
    ),
    Mutant(
        "a sweep that does not look at rows",
        "a_sweep_leaves_packs_with_rows",
        _COLLECTOR + "_sweep",
        "known = {row.key for row in rows}",
        "known = set()",
    ),
    Mutant(
        "a sweep beside open pushes",
        "a_sweep_leaves_packs_of_open_pushes",
        _COLLECTOR + "_sweep",
        'if states.get(creators[key], "open") != PushState.OPEN.value',
        "if creators[key] in states",
    ),
    Mutant(
        "a sweep that looks at rows before it looks at pushes",
        "a_sweep_looks_at_pushes_and_then_at_rows",
        _COLLECTOR + "_sweep",
        _SWEEP_STATES,
        _SWEEP_ROWS_FIRST,
    ),
    Mutant(
        "a key that dies without its event",
        "no_key_dies_without_its_event",
        _COLLECTOR + "_remove",
        'note_event(transaction, "dead", author, key=pack.key)',
        'note_event(transaction, "policy", author)',
    ),
    Mutant(
        "a swept key that dies without its event",
        "no_key_dies_without_its_event",
        _COLLECTOR + "_sweep",
        'note_event(transaction, "dead", author, key=key)',
        'note_event(transaction, "policy", author)',
    ),
    Mutant(
        "DELETE from a registry that was lost",
        "no_delete_from_a_lost_registry",
        "ckpt.service.gc:_delete",
        " and registry.collector.may_delete(dead)",
        "",
    ),
    Mutant(
        "DELETE in another epoch",
        "no_delete_from_a_lost_registry",
        _COLLECTOR + "may_delete",
        " & (epoch == dead.epoch)",
        "",
    ),
    Mutant(
        "a collection whose registry knows less than the store",
        "gc_refuses_when_the_store_knows_more",
        "ckpt.service.gc:_check",
        'if unknown and "unknown" not in allow:',
        "if False:",
    ),
    Mutant(
        "a collection that counts no document",
        "gc_refuses_when_the_store_knows_more",
        "ckpt.service.counted:Counting.counts",
        "copy is not None and",
        "False and",
    ),
    Mutant(
        "acknowledged before the document is in the store",
        "a_push_is_acknowledged_with_its_document",
        "ckpt.service.acknowledge:acknowledge_push",
        "    copy_pending(store, registry)\n",
        "",
    ),
    Mutant(
        "a tag acknowledged before its event is in the store",
        "a_tag_is_acknowledged_with_its_event",
        "ckpt.service.acknowledge:acknowledge_event",
        "    copy_pending(store, registry)\n",
        "",
    ),
    Mutant(
        "a tag acknowledged without asking the registry again",
        "a_tag_in_a_lost_registry_is_not_acknowledged",
        "ckpt.service.acknowledge:acknowledge_event",
        "if not registry.copies.event_stands(event):",
        "if False:",
    ),
    Mutant(
        "an epoch that is not looked at",
        "a_push_into_a_lost_registry_is_not_acknowledged",
        _BOOKS + "is_acknowledgeable",
        "_STATE_IN_EPOCH",
        "_STATE",
    ),
    Mutant(
        "a rebuild that uses dead keys",
        "a_rebuild_never_uses_a_dead_key",
        "ckpt.service.rebuild:_Reader.contents",
        "if info.key not in dead and",
        "if",
    ),
    Mutant(
        "a rebuild that forgets dead keys",
        "a_rebuild_never_uses_a_dead_key",
        _REBUILD + "_make_events",
        'if event["kind"] == "dead" and event["key"] in self.contents.keys:',
        "if False:",
    ),
    Mutant(
        "a rebuild that ignores removals",
        "a_rebuild_brings_nothing_back",
        _REBUILD + "run",
        "self.contents.removed",
        "set()",
    ),
    Mutant(
        "a rebuild that counts what lands late",
        "a_rebuild_counts_nothing_that_lands_late",
        "ckpt.service.counted:Counting.counts",
        '(copy["epoch"] == str(self.epoch) or copy["id"] in self.named)',
        "True",
    ),
    Mutant(
        "a rebuild that counts only what is there",
        "a_rebuild_gives_no_number_again",
        _REBUILD + "_make_models",
        '        said += [event for event in self.contents.events if "model" in event]\n',
        "",
    ),
    Mutant(
        "no fsync of a folder",
        "a_push_survives_the_loss_of_power",
        _LOCAL + "sync_folder",
        'perform("fsync_folder", os.fsync, handle)',
        "pass",
    ),
    Mutant(
        "a pack is told to be there before its name is",
        "a_push_survives_the_loss_of_power",
        _LOCAL + "_LocalUpload.publish",
        "            sync_folder(self._final.parent)\n",
        "",
    ),
    Mutant(
        "a document is told to be there before its name is",
        "a_push_survives_the_loss_of_power",
        _LOCAL + "LocalStore.put",
        "            sync_folder(self.path(key).parent)\n",
        "",
    ),
    Mutant(
        "a file that is not complete gets its name",
        "a_file_gets_its_name_when_it_is_complete",
        _LOCAL + "_LocalUpload.link",
        "if os.fstat(self._handle).st_size != size:",
        "if False:",
    ),
    Mutant(
        "no look at the size after a write",
        "a_pack_of_another_size_is_not_registered",
        _LOCAL + "_LocalUpload.publish",
        "if self._store.size(self._key) != size:",
        "if False:",
    ),
    Mutant(
        "bytes that are not hashed when they are read",
        "what_is_read_is_what_was_pushed",
        "ckpt.storage.chunks:read_place",
        "if found != place.digest:",
        "if False:",
    ),
    Mutant(
        "fsck that does not mark what is broken",
        "what_fsck_found_broken_is_written_again",
        "ckpt.service.fsck:_mark_broken",
        "registry.repairs.mark(wrong, broken=True)",
        "pass",
    ),
    Mutant(
        "prune that does not see aliases",
        "prune_keeps_what_an_alias_names",
        "ckpt.service.retention:_kept",
        "if version.aliases:",
        "if False:",
    ),
    Mutant(
        "rm that does not see aliases",
        "rm_refuses_what_an_alias_names",
        "ckpt.registry.changes:Changes.remove",
        "            self._refuse_aliased(transaction, row, model)\n",
        "",
    ),
)
