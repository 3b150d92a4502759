"""What a model costs, and models of equal cost."""

from l3paper.costs.accounting import account
from l3paper.costs.equal import STAND_INS

__all__ = ["STAND_INS", "account"]
