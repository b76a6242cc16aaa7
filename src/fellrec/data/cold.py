"""Cold-start items and users: items and users with few or no training interactions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fellrec.data.prepared import PreparedData
from fellrec.data.ragged import IntArray, Ragged


@dataclass(frozen=True)
class ColdStart:
    """Masks of the cold items and cold users.

    Attributes:
        items: ``[I]`` bool, items without training interactions at any client. Public users do not count.
        users: ``[U]`` bool, clients' users with fewer than ``users_below`` training interactions.
        users_below: The threshold.
    """

    items: NDArray[np.bool_]
    users: NDArray[np.bool_]
    users_below: int

    @classmethod
    def of(cls, data: PreparedData, users_below: int) -> ColdStart:
        """Count the training interactions of the clients' users."""
        is_private = data.client_of_user >= 0
        trained_on = data.train.values[is_private[data.train.row_index]]
        is_cold_item = np.bincount(trained_on, minlength=len(data.catalogue)) == 0
        return cls(is_cold_item, is_private & (data.train.lengths < users_below), users_below)

    def groups(self, data: PreparedData) -> dict[str, dict[str, Tensor]]:
        """User groups for group metrics: stage → group → ``[U]`` bool (users with a cold target, cold users)."""
        stages = {"val": data.valid, "test": data.test}
        return {
            stage: {
                "cold_items": torch.from_numpy(self._has_cold_target(targets)),
                "cold_users": torch.from_numpy(self.users),
            }
            for stage, targets in stages.items()
        }

    def counts(self, evaluated: IntArray) -> dict[str, int]:
        """Number of cold items in the catalogue, of cold users among those evaluated, and the threshold.

        Args:
            evaluated: Indices of the evaluated users.
        """
        num_users = int(self.users[evaluated].sum())
        return {"items": int(self.items.sum()), "users": num_users, "users_below": self.users_below}

    def _has_cold_target(self, targets: Ragged) -> NDArray[np.bool_]:
        cold = np.bincount(targets.row_index, weights=self.items[targets.values], minlength=len(targets))
        return cold > 0
