"""Optimal assignment: the Hungarian method with potentials, O(n^2 m) (Kuhn 1955, Munkres 1957)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["best_assignment"]


def best_assignment(weights: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
    """Pairs (row, column) of the largest total weight, each row and column at most once.

    `weights` is [N, M], finite. min(N, M) pairs are given, in order of the rows.
    """
    rows, columns = weights.shape
    if rows > columns:
        return sorted((row, column) for column, row in best_assignment(weights.T))
    cost = (-weights).tolist()
    # One-based, as usual for this formulation: column 0 holds the row that is being placed.
    row_potential = [0.0] * (rows + 1)
    column_potential = [0.0] * (columns + 1)
    row_of = [0] * (columns + 1)
    for row in range(1, rows + 1):
        row_of[0] = row
        column = 0
        slack = [math.inf] * (columns + 1)
        came_from = [0] * (columns + 1)
        visited = [False] * (columns + 1)
        while row_of[column]:
            visited[column] = True
            current = row_of[column]
            step, following = math.inf, 0
            for j in range(1, columns + 1):
                if visited[j]:
                    continue
                reduced = cost[current - 1][j - 1] - row_potential[current] - column_potential[j]
                if reduced < slack[j]:
                    slack[j], came_from[j] = reduced, column
                if slack[j] < step:
                    step, following = slack[j], j
            for j in range(columns + 1):
                if visited[j]:
                    row_potential[row_of[j]] += step
                    column_potential[j] -= step
                else:
                    slack[j] -= step
            column = following
        while column:  # shift the chain of placements by one
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    return sorted((row_of[j] - 1, j - 1) for j in range(1, columns + 1) if row_of[j])
