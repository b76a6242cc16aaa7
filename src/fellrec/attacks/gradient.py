"""Gradient matching: the targets of one batch from the gradient that a client sends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fellrec.attacks.observe import Observed
from fellrec.attacks.public import Public
from fellrec.attacks.targets import choices, target_scores

_LEARNING_RATE = 0.3


class GradientMatching:
    """Guesses the targets whose gradient at the second cut is nearest to the one that a client has sent.

    As in Zhu, Liu, Han (2019), "Deep Leakage from Gradients", soft labels y are optimised until the gradient of the
    loss that they give is that of the client: min over y of ‖∂L(y)/∂h − g‖² / ‖g‖². The inputs need not be optimised,
    as the server knows h. Where in a batch something is predicted is given.

    Args:
        public: The public model.
        steps: Of Adam.
    """

    def __init__(self, public: Public, steps: int) -> None:
        self._public = public
        self._steps = steps
        with torch.no_grad():
            self._items = choices(public.objective, public.model)

    def targets(self, observed: Observed, num: int) -> Tensor:
        """See ``TargetAttack``."""
        model, objective = self._public.model, self._public.objective
        with torch.enable_grad(), _eager(self._public):
            second = [hidden_BLD.clone().requires_grad_() for hidden_BLD in observed.second]
            final = [model.tail(hidden_BLD) for hidden_BLD in second]
            log_p_TC = target_scores(objective, model, final, observed.batch, self._items).log_softmax(dim=1)
            labels_TC = torch.zeros_like(log_p_TC, requires_grad=True)
            optimizer = torch.optim.Adam([labels_TC], lr=_LEARNING_RATE)
            size = sum(gradient.square().sum() for gradient in observed.second_gradient)
            for _ in range(self._steps):
                loss = -(labels_TC.softmax(dim=1) * log_p_TC).sum() / len(log_p_TC)
                found = torch.autograd.grad(loss, second, create_graph=True)
                pairs = zip(found, observed.second_gradient, strict=True)
                distance = sum(((own - sent).square().sum() for own, sent in pairs), torch.zeros(())) / size
                (labels_TC.grad,) = torch.autograd.grad(distance, [labels_TC])
                optimizer.step()
        return labels_TC.detach().topk(num, dim=1).indices


@contextmanager
def _eager(public: Public) -> Iterator[None]:
    """While this lasts, attention is computed by what can be differentiated twice."""
    before = public.model.attention
    public.model.use_attention("eager")
    try:
        yield
    finally:
        public.model.use_attention(before)
