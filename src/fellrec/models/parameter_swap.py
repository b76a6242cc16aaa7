"""Several adapters at once in one backbone: each computation sees its own parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


class ParameterSwap:
    """Puts other tensors in the place of a model's parameters for a while.

    Writing an adapter into the parameters would spoil the graphs of clients whose backward pass is still to come;
    their graphs keep the tensors that they were made with.

    Args:
        model: The backbone.
        names: Parameters that can be replaced, by their names in the model.

    Example:
        >>> linear = nn.Linear(1, 1, bias=False)
        >>> swap = ParameterSwap(linear, ["weight"])
        >>> with swap.using({"weight": nn.Parameter(linear.weight.new_zeros(1, 1))}):
        ...     linear(linear.weight.new_ones(1, 1)).item()
        0.0
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        found = dict(model.named_parameters())
        wanted = {id(found[name]): name for name in names}
        # A tied parameter has several places and one name.
        self._places = [
            (wanted[id(parameter)], module, key)
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if id(parameter) in wanted
        ]

    @contextmanager
    def using(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Compute with these tensors in the place of the model's parameters of the same names; others stay."""
        places = [place for place in self._places if place[0] in tensors]
        before = [module._parameters[key] for _, module, key in places]
        try:
            for name, module, key in places:
                module._parameters[key] = tensors[name]  # type: ignore[assignment]
            yield
        finally:
            for (_, module, key), parameter in zip(places, before, strict=True):
                module._parameters[key] = parameter
