"""Which modules of a backbone an adapter trains, by their names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fellrec.errors import BackboneError, nearest_first
from fellrec.models.architectures import ArchSpec
from fellrec.models.remote import RemoteLayer
from fellrec.models.settings import PARTS, TargetSettings, parts_of

ALL_LINEAR = "all-linear"
"""``adapter.target_modules`` for all linear modules of the layers, as in PEFT."""


@dataclass(frozen=True)
class Targets:
    """What an adapter trains of a whole or partial model.

    Attributes:
        modules: Suffixes of the names of the modules that are adapted, or whole names, of which a partial model may
            have none.
        are_suffixes: Which of the two.
        saved: Parameters that are trained as a whole, each with the names of all its places if it is tied.
    """

    modules: Sequence[str] = ()
    are_suffixes: bool = True
    saved: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def names(self, model: nn.Module) -> list[str]:
        """Names of the modules of a model that are adapted."""
        return [name for name in adaptable(model) if matches(name, self.modules)]


def find_targets(model: nn.Module, arch: ArchSpec, settings: TargetSettings, part_of: Callable[[str], str]) -> Targets:
    """The modules and parameters that the settings of an adapter name.

    Args:
        model: A whole or partial model, without an adapter.
        arch: Its architecture.
        settings: Of the adapter.
        part_of: Gives ``head``, ``body`` or ``tail`` for a dotted name of the whole model.

    Raises:
        BackboneError: If a name matches no module; lists existing modules, closest names first. If a module would be
            trained as a whole and adapted.
    """
    parts = parts_of(settings.layers)
    saved = saved_parameters(model, arch, settings.modules_to_save)
    saved = {name: places for name, places in saved.items() if part_of(name) in parts}
    if settings.target_modules == ALL_LINEAR:
        layers = f"{arch.names_prefix}{arch.layers}."
        wanted = [name for name in adaptable(model) if name.startswith(layers)]
    else:
        given = [settings.target_modules] if isinstance(settings.target_modules, str) else settings.target_modules
        suffixes = list(given or arch.lora_targets)
        check_targets(model, suffixes)
        if parts == PARTS:
            check_no_overlap(saved, suffixes)
            return Targets(suffixes, True, saved)
        wanted = [name for name in adaptable(model) if matches(name, suffixes)]
    wanted = [name for name in wanted if part_of(name) in parts]
    check_no_overlap(saved, wanted)
    return Targets(wanted, False, saved)


def wrap(model: nn.Module, targets: Targets, make: Callable[[Any, str], nn.Module]) -> None:
    """Put modules in the place of those that are adapted; of the other parameters only those to save are trained.

    Args:
        model: A whole or partial model, changed in place.
        targets: What is adapted.
        make: Gives the new module of a module and its name.
    """
    model.requires_grad_(False)
    for name in targets.names(model):
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, make(model.get_submodule(name), name))
    for name in targets.saved:
        model.get_parameter(name).requires_grad_(True)


def adaptable(model: nn.Module) -> list[str]:
    """Names of the modules that LoRA can adapt."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def matches(name: str, targets: Sequence[str]) -> bool:
    """Whether a dotted name ends with one of ``targets``.

    Example:
        >>> [matches(name, ["proj"]) for name in ("layers.0.proj", "layers.0.q_proj")]
        [True, False]
    """
    return any(f".{name}".endswith(f".{target}") for target in targets)


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Check that each target of LoRA is a module of the model; a partial model may not have it.

    Raises:
        BackboneError: If one matches no module; lists existing modules, closest names first.
    """
    names = adaptable(model)
    for target in targets:
        if not any(matches(name, [target]) for name in names) and not _is_partial(model):
            last_parts = {name.rpartition(".")[2] for name in names}
            raise BackboneError(
                f"adapter.target_modules: {target!r} matches no module of the backbone; "
                f"it has {', '.join(nearest_first(target.rpartition('.')[2], last_parts)[:8])}"
            )


def saved_parameters(model: nn.Module, arch: ArchSpec, modules: Sequence[str]) -> dict[str, list[str]]:
    """Parameters of the modules that are trained as a whole, each with the names of all its places if it is tied.

    Args:
        model: A whole or partial model.
        arch: Its architecture.
        modules: Suffixes of names of modules.

    Raises:
        BackboneError: If a suffix matches no module with parameters, or one that the layers of all parts share.
    """
    places: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(name)
    every = [name for names in places.values() for name in names]
    found: dict[str, list[str]] = {}
    for module in modules:
        own = [name for name in every if f".{module}." in f".{name}"]
        if any(name.startswith(arch.shared) for name in own):
            raise BackboneError(f"adapter.modules_to_save: {module!r} is used by the layers of all parts, it is frozen")
        if not own and not _is_partial(model):
            last_parts = {name.split(".")[-2] for name in every if "." in name}
            raise BackboneError(
                f"adapter.modules_to_save: {module!r} matches no module with parameters; the backbone has "
                f"{', '.join(nearest_first(module, last_parts)[:8])}"
            )
        for name in own:
            names = places[id(model.get_parameter(name))]
            found[names[0]] = names
    return found


def check_no_overlap(saved: Iterable[str], targets: Sequence[str]) -> None:
    """Refuse modules that are trained as a whole and adapted by LoRA.

    Args:
        saved: Parameters that are trained as a whole.
        targets: Suffixes or names of the modules that LoRA adapts.

    Raises:
        BackboneError: Naming the first one.
    """
    for name in saved:
        if matches(name.rpartition(".")[0], targets):
            raise BackboneError(
                f"{name.rpartition('.')[0]} is in adapter.target_modules and in adapter.modules_to_save"
            )


def _is_partial(model: Any) -> bool:
    """Whether some of the model is in another process, or behind a link."""
    has_remote = any(isinstance(module, RemoteLayer) for module in model.modules())
    return has_remote or isinstance(model.get_input_embeddings(), nn.Identity)
