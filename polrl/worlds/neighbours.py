r"""The nearest pair of state and action in a data set, under a metric whose weight may move at every step.

The squared distance of two pairs is beta^2 |s - s_j|^2 + |a - a_j|^2. A KD-tree over the rows [beta s, a] finds the
least in microseconds, as long as the ball around a query cuts few of the tree's boxes, and is cheap to build anew when
beta moves. Where the balls cut through many boxes (many columns, a beta between both extremes) it becomes slower
than looking at every row; then one matrix product sweeps over all of them. Which of the two answers is decided by
counting boxes, and changes the time only: both find the exact nearest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Rows whose smallest score the sweep keeps.
_BLOCK = 64
#: A product of this many numbers stays in a core's cache.
_PRODUCT = 1 << 17
#: Up to so many distances the sweep costs no more than a tree.
_SMALL = 1 << 18
#: Up to so many columns a tree always prunes well, even one of loose boxes.
_FEW = 6
#: So many calls after beta moved it counts as standing still, and a tighter, dearer tree pays.
_STANDS = 32
#: Below so many rows a bad tree costs little, and its boxes are counted only from the third call on.
_MANY = 50_000
#: A smaller tree over so many rows, cut down to so many in a box, shows how selective the large one is.
_SAMPLE, _BOX = 4096, 16
#: Queries by which it is seen how many boxes they cut, and after how many calls it is seen again.
_PROBES, _PROBE_EVERY = 8, 16
#: The tree is slower than the sweep if a query's ball reaches into boxes with more than this share of the rows; seen
#: at 10^4 to 10^6 rows and 4 to 23 columns.
_TOO_MANY = 0.1


@dataclass(slots=True)
class _Tree:
    """A KD-tree over rows [beta s, a], and a small one's boxes: corners, both [d, boxes], and the rows in each."""

    beta: float
    tree: Any
    sample: np.ndarray[Any, Any]
    boxes: tuple[np.ndarray[Any, Any], ...] | None = None

    @classmethod
    def build(cls, beta: float, points: np.ndarray[Any, Any], tight: bool) -> _Tree:
        from scipy.spatial import cKDTree

        # Without balance a third cheaper to build, and queries are as fast; with loose boxes another third.
        tree = cKDTree(points, balanced_tree=False, compact_nodes=tight)
        return cls(beta, tree, points[:: -(-len(points) // _SAMPLE)].copy())

    def reached(self, points: np.ndarray[Any, Any], distances: np.ndarray[Any, Any]) -> float:
        """Return the mean share of rows in boxes into which balls of `distances` [n] around `points` [n, d] reach."""
        if self.boxes is None:
            self.boxes = _boxes(self.sample)
        low, high, rows = self.boxes
        outside = np.maximum(low - points[:, :, None], points[:, :, None] - high).clip(min=0)
        near = np.einsum("ndb,ndb->nb", outside, outside) <= distances[:, None] ** 2
        return float((near @ rows).mean() / rows.sum())


def _boxes(points: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """Return the corners [d, boxes] of a KD-tree's leaves, which fill the space between its planes, and their rows."""
    from scipy.spatial import cKDTree

    tree = cKDTree(points, leafsize=_BOX, balanced_tree=False, compact_nodes=False)
    waiting, leaves = [(tree.tree, tree.mins, tree.maxes)], []
    while waiting:
        node, low, high = waiting.pop()
        if node.split_dim < 0:
            leaves.append((low, high, node.end_idx - node.start_idx))
            continue
        below, above = high.copy(), low.copy()
        below[node.split_dim] = above[node.split_dim] = node.split
        waiting += [(node.lesser, low, below), (node.greater, above, high)]
    low, high, rows = (np.array(column).T for column in zip(*leaves, strict=True))
    return low, high, rows


class NearestPairs:
    """All logged pairs, ready to be asked for the one nearest to (s, a).

    A constant in the contract's sense: it keeps no state on which an answer depends.

    Parameters
    ----------
    states : Tensor, [N, ds]
        Standardised, or in whatever unit beta is meant.
    actions : Tensor, [N, da]

    Examples
    --------
    >>> pairs = NearestPairs(torch.tensor([[0.0], [1.0]]), torch.tensor([[-1.0], [1.0]]))
    >>> state, action = torch.tensor([[0.0]]), torch.tensor([[0.9]])
    >>> pairs.query(state, action, beta=0.1), pairs.query(state, action, beta=10.0)
    (tensor([1]), tensor([0]))
    """

    def __init__(self, states: Tensor, actions: Tensor) -> None:
        if states.dim() != 2 or actions.dim() != 2 or not 0 < len(states) == len(actions):
            raise ValueError(
                "states and actions must be [N, ds] and [N, da] with at least one row, got "
                f"{list(states.shape)} and {list(actions.shape)}"
            )
        if not bool(states.isfinite().all() and actions.isfinite().all()):
            raise ValueError("states and actions must be finite")
        self.states, self.actions = states.detach(), actions.detach()
        self._columns = torch.cat([self.states, self.actions], dim=1).T.float().contiguous()
        self._squares = torch.stack([_square(self.states), _square(self.actions)])
        self._general = _in_general_position(self.states, self.actions)
        self._rows = np.concatenate([_numpy(self.states), _numpy(self.actions)], axis=1) if self._general else None
        self._tree: _Tree | None = None
        self._calls = 0
        self._selective = True

    def __len__(self) -> int:
        return len(self.states)

    def query(self, states: Tensor, actions: Tensor, beta: float, k: int = 1) -> Tensor:
        """Return the index of the k-th nearest row, int64 [B]; of rows equally near the lowest index comes first.

        Parameters
        ----------
        states, actions : Tensor, [B, ds] and [B, da]
            On the device of the data. Nothing is differentiated.
        beta : float
            Weight of the states, above 0.
        k : int
            From 1 to N.

        Raises
        ------
        ValueError
            If beta or k is out of range, or the shapes don't fit.
        """
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta must be above 0 and finite, got {beta!r}")
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be from 1 to the number of rows, {len(self)}, got {k!r}")
        expected = [[len(states), self.states.shape[1]], [len(states), self.actions.shape[1]]]
        if [list(states.shape), list(actions.shape)] != expected:
            raise ValueError(
                f"states and actions must be [B, {expected[0][1]}] and [B, {expected[1][1]}], got "
                f"{list(states.shape)} and {list(actions.shape)}"
            )
        states, actions = states.detach(), actions.detach()
        if not len(states):
            return torch.empty(0, dtype=torch.long, device=states.device)
        if len(states) * len(self) <= _SMALL or self.states.device.type != "cpu" or not self._general:
            return self._sweep(states, actions, beta, k)
        points = np.concatenate([_numpy(states) * beta, _numpy(actions)], axis=1)
        tree = self._tree_at(beta)
        if not self._prunes(tree, points[:_PROBES], k):
            return self._sweep(states, actions, beta, k)
        return torch.from_numpy(tree.tree.query(points, k=[k])[1][:, 0].astype(np.int64))

    def _tree_at(self, beta: float) -> _Tree:
        """Return a tree for this beta; a loose one, which is soon built, until beta stands still."""
        tree, moved = self._tree, self._tree is None or self._tree.beta != beta
        self._calls = 0 if moved else self._calls + 1
        if tree is None or moved or (self._calls == _STANDS and len(self._columns) > _FEW):
            weights = np.repeat([beta, 1.0], [self.states.shape[1], self.actions.shape[1]])
            tree = self._tree = _Tree.build(beta, self._rows * weights, tight=self._calls == _STANDS)
        return tree

    def _prunes(self, tree: _Tree, probes: np.ndarray[Any, Any], k: int) -> bool:
        """Return whether the tree is faster than the sweep, as seen by a few queries, now and then."""
        if len(self._columns) <= _FEW:
            return True
        if self._calls == 0:
            self._selective = True
        if self._calls % _PROBE_EVERY == (0 if len(self) >= _MANY else 2):
            self._selective = tree.reached(probes, tree.tree.query(probes, k=[k])[0][:, 0]) <= _TOO_MANY
        return self._selective

    def _sweep(self, states: Tensor, actions: Tensor, beta: float, k: int) -> Tensor:
        """Score all rows in float32, then settle in float64 between those that rounding could have put first."""
        scores, slack = self._block_scores(states, actions, beta)
        if k <= scores.shape[1]:
            kth = scores.topk(k, dim=1, largest=False).values[:, -1:]
        else:  # k blocks hold k rows at least; fewer blocks promise nothing
            kth = torch.full_like(slack, torch.inf)
        hopeful = scores <= kth + 2 * slack
        group = max(1, (_PRODUCT // _BLOCK) // max(1, int(hopeful.sum(dim=1).max())))
        return torch.cat(
            [
                self._settle(states[i : i + group], actions[i : i + group], beta, k, hopeful[i : i + group])
                for i in range(0, len(states), group)
            ]
        )

    def _block_scores(self, states: Tensor, actions: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Return the smallest score of each block of rows [B, blocks], and by how much a score may be off [B, 1].

        A score is the squared distance less beta^2 |s|^2 + |a|^2, the query's own share.
        """
        factor, count = beta * beta, len(self)
        query = torch.cat([states * (-2 * factor), actions * -2], dim=1).float()
        bias = self._squares[0] * factor + self._squares[1]
        bias_32 = bias.float()
        chunk = max(1, _PRODUCT // len(query) // _BLOCK) * _BLOCK
        lowest = []
        for start in range(0, count, chunk):
            scores = torch.addmm(bias_32[start : start + chunk], query, self._columns[:, start : start + chunk])
            beyond = -scores.shape[1] % _BLOCK
            if beyond:
                scores = torch.nn.functional.pad(scores, (0, beyond), value=torch.inf)
            lowest.append(scores.unflatten(1, (-1, _BLOCK)).amin(dim=2))
        reach = factor * (states.norm(dim=1) + self._squares[0].amax().sqrt()) ** 2
        reach = reach + (actions.norm(dim=1) + self._squares[1].amax().sqrt()) ** 2
        slack = reach.float() * (len(self._columns) + 8) * torch.finfo(torch.float32).eps
        return torch.cat(lowest, dim=1), slack.unsqueeze(1)

    def _settle(self, states: Tensor, actions: Tensor, beta: float, k: int, hopeful: Tensor) -> Tensor:
        """Return the k-th nearest row [B] among the blocks marked in `hopeful` [B, blocks], by (distance, index)."""
        # Blocks in their order, so that the rows of a question ascend, and a stable sort settles ties.
        question, block = hopeful.nonzero(as_tuple=True)
        counts = hopeful.sum(dim=1)
        place = torch.arange(len(block), device=block.device) - (counts.cumsum(dim=0) - counts)[question]
        blocks = torch.full((len(states), int(counts.max())), len(self), device=block.device)  # beyond the last row
        blocks[question, place] = block
        rows = (blocks.unsqueeze(2) * _BLOCK + torch.arange(_BLOCK, device=block.device)).flatten(1)
        real = rows < len(self)
        rows = rows.clamp(max=len(self) - 1)
        distances = self._squared_distances(states, actions, rows, beta).masked_fill(~real, torch.inf)
        kth = distances.sort(dim=1, stable=True).indices[:, k - 1 : k]
        return rows.gather(1, kth)[:, 0]

    def _squared_distances(self, states: Tensor, actions: Tensor, rows: Tensor, beta: float) -> Tensor:
        """Return the squared distance of each query to some rows, both [B, m], in the highest precision there is."""
        precise = torch.float32 if states.device.type == "mps" else torch.float64
        to_state = states.to(precise).unsqueeze(1) - self.states[rows].to(precise)
        to_action = actions.to(precise).unsqueeze(1) - self.actions[rows].to(precise)
        return beta * beta * to_state.pow(2).sum(dim=2) + to_action.pow(2).sum(dim=2)


def _square(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64).pow(2).sum(dim=1)


def _numpy(x: Tensor) -> np.ndarray[Any, Any]:
    return x.cpu().double().numpy()


def _in_general_position(states: Tensor, actions: Tensor) -> bool:
    """Return whether ties need no thought: no row occurs twice, and some column is no grid of a few values.

    A tree names any of several rows that are equally near; such data is left to the sweep, which names the first.
    """
    if states.device.type != "cpu":
        return False
    rows = np.ascontiguousarray(torch.cat([states, actions], dim=1).numpy()) + 0.0  # -0 becomes 0
    for column in rows.T:
        _, place, counts = np.unique(column, return_inverse=True, return_counts=True)
        if len(counts) >= 0.9 * len(rows):
            alike = rows[counts[place] > 1]
            return len(np.unique(alike, axis=0)) == len(alike)
    return False
