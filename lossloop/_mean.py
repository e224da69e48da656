"""A mean that is not divided yet: sums of losses and of weights, on the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from lossloop._types import accumulator_dtype


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a + b` as a rounded sum and its exact error (Knuth, TAOCP 4.2.2, 1969)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


class Mean(NamedTuple):
    """`sum of loss_sum / sum of n`, kept as its two sums.

    Pairs add, so any split of the data into batches, in any order, has the same mean
    (up to the rounding of float64 sums; counts are integers and exact). Where the
    device has no float64, each sum carries the error of its additions in `low`.

    Example:
        >>> mean = Mean.empty().add(torch.tensor(6.0), torch.tensor(3))
        >>> mean = mean.add(torch.tensor(10.0), torch.tensor(1))
        >>> mean.value()
        4.0
    """

    total: Tensor  # (), sum of loss_sum
    weight: Tensor  # (), sum of n; int64 as long as every n is
    low: tuple[Tensor, Tensor] | None = None  # (), () errors of total and weight

    @classmethod
    def empty(
        cls,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "Mean":
        """The mean of nothing, ready to be added to.

        Args:
            device: Where the sums are kept.
            dtype: Of the total; default float64, or float32 with a compensated sum
                where the device has no float64.
        """
        device = torch.device(device)
        dtype = dtype or accumulator_dtype(device)
        total = torch.zeros((), dtype=dtype, device=device)
        if dtype == torch.float64:
            return cls(total, torch.zeros((), dtype=torch.int64, device=device))
        return cls(total, total.clone(), (total.clone(), total.clone()))

    def add(self, loss_sum: Tensor, n: Tensor) -> "Mean":
        """The mean with one more batch.

        Args:
            loss_sum: Weighted sum of losses, shape ().
            n: Sum of weights, shape ().
        """
        if self.low is None:
            if n.is_floating_point():
                n = n.to(self.total.dtype)  # or the sum would be kept in its precision
            return Mean(self.total + loss_sum, self.weight + n)
        dtype = self.total.dtype
        total, total_error = _two_sum(self.total, loss_sum.to(dtype))
        weight, weight_error = _two_sum(self.weight, n.to(dtype))
        low = (self.low[0] + total_error, self.low[1] + weight_error)
        return Mean(total, weight, low)

    def merge(self, other: "Mean") -> "Mean":
        """The mean over the data of both, as if they had been seen together.

        Example:
            >>> one = Mean(torch.tensor(6.0), torch.tensor(3))
            >>> one.merge(Mean(torch.tensor(10.0), torch.tensor(1))).value()
            4.0
        """
        merged = self.add(other.total, other.weight)
        return merged if other.low is None else merged.add(*other.low)

    def read(self) -> tuple[float, float]:
        """`(total, weight)` as Python numbers, in one transfer from the device."""
        parts = (self.total, self.weight, *(self.low or ()))
        if self.total.device.type == "cpu":
            total, weight, *low = [part.item() for part in parts]
        else:
            dtype = accumulator_dtype(self.total.device)
            total, weight, *low = torch.stack([p.to(dtype) for p in parts]).tolist()
        if low:
            return total + low[0], weight + low[1]
        return total, weight if self.weight.is_floating_point() else int(weight)

    def value_and_weight(self) -> tuple[float, float]:
        """The mean and its total weight (an int if all are); one wait for the device.

        Raises:
            ValueError: If the total weight is not positive: a mean of nothing is
                undefined, and never 0.0.
        """
        total, weight = self.read()
        if not weight > 0:
            raise ValueError(
                f"Mean.value(): the mean of no data is undefined: the total weight is "
                f"{weight:g}. Every target was ignored or had weight 0, or there was "
                f"no batch; check ignore_index, the class weights and the loader."
            )
        return total / weight, weight

    def value(self) -> float:
        """The mean as a Python float; waits for the device.

        Raises:
            ValueError: If the total weight is not positive.
        """
        return self.value_and_weight()[0]
