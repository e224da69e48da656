"""The training loops that benchmarks/compare_gpu.py times, and the works they train.

Each loop is a function `train(task, device, turn)`. It trains `task.work.model()` on
all the data of the work, in the order of its shuffling loader, and calls
`turn(seconds, loss)` after each epoch, with the seconds that it took, the device waited
for at both ends, and the mean loss. `turn` returns when the next epoch is to be made,
or False when it is not. What `train` returns is a remark for the record.

`python -m rivals` is a process with one of them; see `rivals.__main__`.
"""

from collections.abc import Callable

Turn = Callable[[float, float], bool]
