"""What a model costs, and models of equal cost."""

from l3paper.costs.accounting import Accounting, account, weighted_mean_rows

__all__ = ["Accounting", "account", "weighted_mean_rows"]
