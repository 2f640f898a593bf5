"""The order of Curriculum-DPO: pairs whose images are easy to tell apart come first.

Axes: N pairs.
"""

import grain
import numpy as np


class CurriculumOrder:
    """The endless order in which training sees pairs, from those with the largest gap of scores on (arXiv 2405.13637).

    The run has B stages of equal length. Stage b draws from the b/B of the pairs with the largest gaps, so pairs of
    earlier stages come again, and shuffles them anew whenever it has seen them all. The last stage, with all pairs, has
    no end. The released code does the same, with a number of steps per stage; its gap is absolute. Here it is negative
    where the judge contradicts the label, and these pairs come last.

    The pair at a position depends on the gaps, the seed, the position and the length of the run alone.
    """

    def __init__(self, gap_N: np.ndarray, seed: int, *, blocks: int, positions: int):
        """Make the order.

        Args:
            gap_N: score of the better image minus that of the worse one; equal gaps are ordered by index.
            blocks: B, the number of stages.
            positions: examples that the whole run will see.
        """
        self._easiest_N = np.argsort(-gap_N, kind="stable")
        self._blocks, self._positions = blocks, positions
        numbers = [-(-stage * len(gap_N) // blocks) for stage in range(1, blocks + 1)]
        self._orders = [grain.MapDataset.range(number).seed(seed).shuffle().repeat(None) for number in numbers]

    def __len__(self) -> int:
        return len(self._orders[0])

    def __getitem__(self, position: int) -> int:
        stage = min(position * self._blocks // self._positions, self._blocks - 1)
        begin = -(-stage * self._positions // self._blocks)
        return int(self._easiest_N[self._orders[stage][position - begin]])
