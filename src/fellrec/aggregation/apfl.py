"""APFL (Deng, Kamani and Mahdavi, 2020): each client is served a mixture of the shared and of a personal model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fellrec.aggregation.mean import MeanRule
from fellrec.aggregation.settings.personalised import APFLSettings
from fellrec.federated.population import JobNeeds
from fellrec.federated.populations import SharedModel
from fellrec.federated.ranks import Ranks
from fellrec.federated.records import ScoreJob
from fellrec.federated.slot_state import SECOND
from fellrec.federated.terms import SecondModel, TermContext
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import Adapter

ALPHA = "alpha"
"""Name of α among a client's tensors; it is the same for all parameters."""


@dataclass(frozen=True)
class Personal(SecondModel):
    """The personal model v with the loss ``F(α v + (1 − α) w)``, and α, which takes a gradient step on the same loss.

    The gradient of v is ``α ∇F``, that of α ``⟨v − w, ∇F⟩``, both before clipping. v and w step from the same values.
    """

    alpha: float
    rate: float

    def point(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Mapping[str, Tensor]:
        """See ``SecondModel``: the mixture."""
        context.kept["difference"] = {name: v.float() - context.beside[name].float() for name, v in parameters.items()}
        return mixture(parameters, context.beside, float(self._alpha(context)))

    def correct(self, gradients: Mapping[str, Tensor], context: TermContext) -> None:
        """See ``LocalTerm``: from ∇F to the gradient of v; α moves."""
        alpha, difference = self._alpha(context), context.kept["difference"]
        products = [(difference[name] * gradient).sum().double().cpu() for name, gradient in gradients.items()]
        slope = torch.stack(products).sum() if products else torch.zeros(())
        for gradient in gradients.values():
            gradient.mul_(float(alpha))
        if self.rate and slope.isfinite():  # with a scaled loss, a step whose gradients are not finite is left out
            context.kept[ALPHA] = {ALPHA: (alpha - self.rate * slope).clamp(0, 1)}

    def finish(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Mapping[str, Adapter]:
        """See ``LocalTerm``: α."""
        return {ALPHA: dict.fromkeys(parameters, self._alpha(context))}

    def _alpha(self, context: TermContext) -> Tensor:
        """α as it is now, float64 without dimensions."""
        kept = context.kept.get(ALPHA) or context.tensors.get(ALPHA) or {}
        return next((alpha.cpu() for alpha in kept.values()), torch.tensor(self.alpha, dtype=torch.float64))


def mixture(personal: Mapping[str, Tensor], shared: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """``α v + (1 − α) w``, computed in float32, in the types of v.

    Example:
        >>> mixture({"a": torch.tensor([4.0])}, {"a": torch.tensor([0.0])}, 0.25)
        {'a': tensor([1.])}
    """
    return {n: (alpha * v.float() + (1 - alpha) * shared[n].float()).to(v.dtype) for n, v in personal.items()}


class SharedAndMixed(SharedModel):
    """The server's model w, and each client's v and α among its tensors; clients are served the mixture.

    v starts as the initial adapter. Absent clients keep v and α, and are served a mixture with the present w.

    Args:
        initial: As in ``Population``.
        num_clients: As in ``Population``.
        needs: As in ``Population``.
        alpha: Of clients that have not trained.
    """

    def __init__(self, initial: Adapter, num_clients: int, needs: JobNeeds, alpha: float) -> None:
        super().__init__(initial, num_clients, needs)
        self._alpha = alpha
        own = StoredTensors({f"{SECOND}|{name}": tensor for name, tensor in self.initial.tensors().items()})
        self._tensors = dict.fromkeys(range(num_clients), own)

    def score_jobs(self) -> list[ScoreJob]:
        """See ``Population``."""
        mixed = [self.store.put(client, self.mixture(client)) for client in range(self.num_clients)]
        return self.score_jobs_of(mixed, self.base)

    def mixture(self, client: int) -> Adapter:
        """What a client is served now."""
        own = self.tensors_of(client)
        alpha = next((float(t) for key, t in own.items() if key.startswith(f"{ALPHA}|")), self._alpha)
        return mixture({name: own[f"{SECOND}|{name}"] for name in self.bank.kinds}, self.bank.row(client), alpha)


class APFL(MeanRule, APFLSettings):
    """FedAvg for the shared model w; each client also trains a personal v, and ``α v + (1 − α) w`` is served.

    Here α moves in every local step. The authors' program moves it in the first step of a round, adds 0.02 α to its
    gradient, mixes the outputs of both models instead of their parameters, and trains v after w has taken its step.
    AdamW divides by the size of gradients, so that v's step hardly depends on their factor α.
    """

    population = SharedModel

    def __post_init__(self) -> None:
        """Make the second model."""
        super().__post_init__()
        self.second_model = Personal(self.alpha, self.alpha_rate)

    def new_population(
        self,
        initial: Mapping[str, Tensor],
        num_clients: int,
        reset_optimizer: bool = False,
        ranks: Ranks | None = None,
    ) -> SharedAndMixed:
        """The population, which serves mixtures."""
        return SharedAndMixed(initial, num_clients, self.job_needs(reset_optimizer, ranks), self.alpha)
