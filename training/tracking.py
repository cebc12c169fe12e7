"""What a run saves of each tracked object, and how it is given back: strictly, by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from ckpt.core.errors import CkptWarning, IntegrityError, UsageError
from ckpt.core.printable import escape
from ckpt.loader.classes import is_of_torch
from ckpt.loader.fill import check_fit, fill_module, unwrapped
from ckpt.loader.snapshot import STATE_HOOKS
from ckpt.training.randomness import random_states, restore_random_states

_PARAMETERS, _CLASS, _GENERATOR = "parameters", "class", "generator"
_STATE_METHODS = (
    "state_dict",
    "load_state_dict",
    "_save_to_state_dict",
    "_load_from_state_dict",
)  # all have "state_dict" in their names, as the hooks have; those that take it have "load"
_OF_A_RANK = (torch.Generator, DataLoader, Dataset, Sampler)
# Of which module the wrappers have no state of their own, and where is what they wrap.
_WRAPPERS = {"accelerate.optimizer": "optimizer", "accelerate.scheduler": "scheduler"}
RESERVED = ("step", "random", "ranks")


def check_part(name: str, part: Any) -> None:
    """Refuse what cannot be tracked; UsageError ``not-trackable``."""
    if name in RESERVED:
        raise UsageError("not-trackable", f'"{name}" is a name that runs use', hint="rename it")
    if isinstance(part, torch.Generator):
        return
    if isinstance(part, nn.Module) and _is_sharded(part):
        raise UsageError(
            "not-trackable",
            f"{name} is sharded over several processes, and one of them saves for all",
            hint="save shard by shard: dcp.save(state, storage_writer=ckpt.dcp_writer(repo, …))",
        )
    if not all(callable(getattr(part, act, None)) for act in ("state_dict", "load_state_dict")):
        raise UsageError(
            "not-trackable",
            f"{name}, a {type(part).__name__}, has no state_dict and load_state_dict",
            hint="give it both, or keep it out of track()",
        )


def bare(part: Any) -> Any:
    """An optimizer or scheduler without the wrapper of Accelerate, under which the classes of all
    would look the same."""
    inner = _WRAPPERS.get(type(part).__module__)
    return part if inner is None else getattr(part, inner)


def _is_sharded(module: nn.Module) -> bool:
    """Whether it is of FSDP, or has tensors that lie on several processes."""
    kinds = [type(one).__name__ for one in module.modules()]
    kinds += [type(one.data).__name__ for one in module.parameters()]
    return bool({"FullyShardedDataParallel", "DTensor"} & {*kinds})


def state_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The states of all parts by name, and of the random number generators."""
    names = parameter_names(parts)
    state = {name: _state(part, names) for name, part in parts.items()}
    return {**state, "random": random_states()}


def own_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are another thing on each rank: generators and what gives data. The others are
    the same everywhere, and rank 0 alone is asked for their states."""
    return {name: part for name, part in parts.items() if isinstance(part, _OF_A_RANK)}


def _state(part: Any, names: Mapping[int, str]) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    state = part.state_dict()
    if isinstance(part, torch.optim.Optimizer):
        return {**state, **_about(part, names)}
    if isinstance(part, LRScheduler):
        return {**state, _CLASS: type(part).__qualname__}
    if isinstance(part, DataLoader) and part.generator is not None:
        return {**state, _GENERATOR: part.generator.get_state()}
    return state


def restore(parts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Give every part its state back, in the order of :func:`_turn`, and the random number
    generators of Python, NumPy and torch last.

    Raises:
        IntegrityError: ``parts-differ``, ``parameters-differ``, ``optimizer-differs``,
            ``scheduler-differs``, ``keys-mismatch``, ``shape-mismatch``, ``dtype-mismatch``.
    """
    saved = set(state) - set(RESERVED)
    if saved != set(parts):
        raise IntegrityError(
            "parts-differ",
            f"saved were {_shown(saved)}; tracked are {_shown(parts)}",
            hint="track the same objects under the same names",
        )
    if "random" not in state:  # of a rank that was not there: it goes on with the data that it has
        own = own_parts(parts)
        parts = {name: part for name, part in parts.items() if name not in own}
    names = parameter_names(parts)
    for name, part in parts.items():  # before anything is changed
        with _said_of(name):
            if isinstance(part, torch.optim.Optimizer):
                _check_optimizer(part, state[name], names)
            elif isinstance(part, LRScheduler):
                check_class("scheduler", part, state[name].get(_CLASS, type(part).__qualname__))
            elif isinstance(part, nn.Module) and _is_usual(part, state[name]):
                check_fit(part, state[name])
            elif isinstance(part, nn.Module):
                _check_own(part, state[name])
    for name, part in sorted(parts.items(), key=lambda item: _turn(item[1])):
        with _said_of(name):
            _restore(part, state[name])
    if "random" in state:
        restore_random_states(state["random"])


def _turn(part: Any) -> int:
    """When a part is restored: modules first, which others look at; loaders, which draw numbers
    for it, before the generators that they may draw from."""
    if isinstance(part, nn.Module):
        return 0
    if isinstance(part, torch.Generator):
        return 3
    return 2 if isinstance(part, DataLoader) else 1


@contextmanager
def _said_of(name: str) -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(error.code, f"{name}: {error.message}", hint=error.hint) from error


def _restore(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state.cpu())
    elif isinstance(part, torch.optim.Optimizer):
        _restore_optimizer(part, state)
    elif isinstance(part, nn.Module) and _is_usual(part, state):
        fill_module(part, state)
    elif isinstance(part, DataLoader):  # torchdata's
        _restore_loader(part, state)
    elif isinstance(part, LRScheduler):
        part.load_state_dict({key: state[key] for key in state if key != _CLASS})
    else:
        part.load_state_dict(state)


def _restore_loader(part: Any, state: Any) -> None:
    """Give a loader its state, and its generator the one of the save."""
    drawn = state.get(_GENERATOR)
    part.load_state_dict({key: state[key] for key in state if key != _GENERATOR})
    part.state_dict()  # begins to iterate: that draws a number, before they are restored
    if drawn is not None and part.generator is not None:
        part.generator.set_state(drawn.cpu())


def _about(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """What a run saves of an optimizer beside its state."""
    described = described_parameters(optimizer, names)
    return {_PARAMETERS: described, _CLASS: type(optimizer).__qualname__}


def check_class(what: str, part: Any, saved: str) -> None:
    """Refuse the state of another class."""
    now = type(part).__qualname__
    if saved != now:
        raise IntegrityError(
            f"{what}-differs",
            f"saved was the state of {escape(saved, 80)}, the {what} there is {now}",
            hint=f"go on with the same {what}, or take the weights alone by repo.pull",
        )


def _check_optimizer(part: torch.optim.Optimizer, state: Any, names: Mapping[int, str]) -> None:
    """One optimizer's moments mean nothing to another, and torch does not ask."""
    check_class("optimizer", part, state.get(_CLASS, type(part).__qualname__))
    check_parameters(state[_PARAMETERS], _about(part, names)[_PARAMETERS])
    groups = [len(group["params"]) for group in part.param_groups]
    if [len(group["params"]) for group in state["param_groups"]] != groups:
        raise IntegrityError(
            "parameters-differ",
            f"the optimizer's groups were others; there are {groups} parameters in each",
            hint="give the optimizer the same groups of parameters",
        )


def _restore_optimizer(part: torch.optim.Optimizer, state: Any) -> None:
    """Give an optimizer its state. torch casts it to the dtype of each parameter; what was of
    another, such as weights in full precision, is put back as it was."""
    part.load_state_dict({key: state[key] for key in state if key not in (_PARAMETERS, _CLASS)})
    every = [one for group in part.param_groups for one in group["params"]]
    for number, saved in state["state"].items():
        if type(number) is not int or not isinstance(saved, dict):
            continue  # of no parameter: what an optimizer keeps for all of them
        own = part.state[every[number]]
        for key, value in saved.items():
            loaded = own.get(key)
            both = isinstance(value, torch.Tensor) and isinstance(loaded, torch.Tensor)
            if both and loaded.dtype != value.dtype:
                own[key] = value.to(loaded.device, copy=True)


def _is_usual(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether a module's state is its own tensors by name, which can be filled in place: no class
    or hook makes something else of it."""
    return all(isinstance(value, torch.Tensor) for value in state.values()) and not any(
        not is_of_torch(found) for one in module.modules() for found in _makers_of_state(one)
    )


def _check_own(module: nn.Module, state: Any) -> None:
    """Refuse a cast, which a module that takes its state by itself makes without a word; also
    another shape, unless code of its own may know what to do with it."""
    own = module.state_dict()
    if not isinstance(own, Mapping) or not isinstance(state, Mapping):
        return
    takes = any(
        not is_of_torch(found)
        for one in module.modules()
        for found in _makers_of_state(one, "load")
    )
    for key in own.keys() & state.keys():
        saved, now = state[key], own[key]
        if not isinstance(saved, torch.Tensor) or not isinstance(now, torch.Tensor):
            continue
        for what in ("dtype",) if takes or nn.parameter.is_lazy(now) else ("dtype", "shape"):
            one, other = getattr(saved, what), getattr(now, what)
            if one != other:
                raise IntegrityError(
                    f"{what}-mismatch",
                    f"{escape(str(key))} saved {_plain(one)}, model {_plain(other)}",
                    hint="track the same architecture, in the dtype that was saved",
                )


def _plain(value: Any) -> Any:
    return [*value] if isinstance(value, torch.Size) else value


def _makers_of_state(module: nn.Module, word: str = "state_dict") -> Iterator[Any]:
    """The code by which a module gives and takes its state; by ``word``, "load", takes it."""
    for name in _STATE_METHODS:
        if word in name:
            yield getattr(type(module), name)
    for place in STATE_HOOKS:
        if word not in place:
            continue
        for hook in getattr(module, place).values():
            yield getattr(hook, "hook", hook)


def parameter_names(parts: Mapping[str, Any]) -> dict[int, str]:
    """Names of the parameters of all tracked modules, by identity; with or without a wrapper around
    all of a module, such as that of torch.compile, they are the same."""
    return {
        id(parameter): f"{name}.{unwrapped(path)}"
        for name, part in parts.items()
        if isinstance(part, nn.Module)
        for path, parameter in part.named_parameters()
    }


def described_parameters(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> list[list[str]]:
    """``[name, dtype, shape]`` of an optimizer's parameters in its order: the name in a tracked
    module, else that which the optimizer was given, else the number."""
    every = [
        (one, given)
        for group in optimizer.param_groups
        for one, given in zip_longest(group["params"], group.get("param_names", ()))
    ]
    return [
        [names.get(id(one), given or f"#{number}"), str(one.dtype), str(list(one.shape))]
        for number, (one, given) in enumerate(every)
    ]


def check_parameters(saved: list[list[str]], now: list[list[str]]) -> None:
    """Refuse other parameters, another order or another dtype. Where no name was known, the place
    counts, which is told by a :class:`CkptWarning`."""
    nameless = [one[0] for one in saved if one[0].startswith("#")]
    if nameless:
        warnings.warn(
            f"{len(nameless)} parameters of an optimizer have no known name, so that their order is"
            " not checked; track their module, or give the optimizer named_parameters()",
            CkptWarning,
            stacklevel=5,
        )
    for one, other in _pairs(saved, now):
        if one != other and (one[0] not in nameless or one[1:] != other[1:]):
            raise IntegrityError(
                "parameters-differ",
                f"the optimizer's state is of {_shown(one)}, the parameter there is {_shown(other)}",
                hint="give the optimizer the same parameters in the same order and dtype",
            )


def _pairs(saved: list[list[str]], now: list[list[str]]) -> Iterator[tuple[list[str], list[str]]]:
    for number in range(max(len(saved), len(now))):
        one = saved[number] if number < len(saved) else ["nothing"]
        yield one, now[number] if number < len(now) else ["nothing"]


def _shown(names: Any) -> str:
    return escape(" ".join(sorted(names) if isinstance(names, set | dict) else names), 200)
