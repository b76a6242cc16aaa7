"""The laws that every aggregation rule must keep, each checked on small rounds of a toy federation.

A law that cannot hold for a rule is left out because of what the rule declares: ``limits``, ``sees``, ``population``,
whether it has a mixing matrix, and ``waived_laws``.
"""

from __future__ import annotations

from fellrec.aggregation.laws import cases, memory, results, runs
from fellrec.aggregation.laws.law import Law, Subject
from fellrec.aggregation.laws.runs import EXCLUDED

LAWS: dict[str, Law] = {**results.LAWS, **memory.LAWS, **cases.LAWS, **runs.LAWS}
"""All laws by name, in the order in which they are checked."""
FIRST = ("sees", "rows_sum_to_1", "rounds")
"""Laws without which the others cannot be checked."""

__all__ = ["EXCLUDED", "FIRST", "LAWS", "Law", "Subject"]
