"""What a model costs, and models of equal cost."""

from l3paper.costs.accounting import Accounting, account, weighted_mean_rows
from l3paper.costs.equal import STAND_INS, match_deeper, match_moe, match_wider

__all__ = [
    "STAND_INS",
    "Accounting",
    "account",
    "match_deeper",
    "match_moe",
    "match_wider",
    "weighted_mean_rows",
]
