"""What every in-context classifier of tables shares: the batch it takes, its prediction.

A sample is a whole table: labelled rows first (the context), then the rows whose class is asked for. A batch holds
    x           float32 [batch, rows, features]: any scale, categories as numbers, NaN where a value is missing; 0 beyond a table's own
                rows and columns
    label       int64 [batch, rows]: 0 .. classes - 1; -100 where it isn't known, isn't to be counted, or beyond a table's own rows
    context     int64 [batch]: rows that are labelled, at least 1
    rows        int64 [batch]: rows in all
    features    int64 [batch]: columns
    classes     int64 [batch]: classes among the labelled rows
    categorical bool [batch, features]: columns whose numbers have no order
    class_names list of tuples of str: what the table's classes are called
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

UNKNOWN = -100


class TableLabels(NamedTuple):
    """probabilities: float32 [batch, rows, classes], of the rows that were asked for, 0 elsewhere. label: int64 [batch, rows], the
    likeliest class of these rows, -100 elsewhere."""

    probabilities: Tensor
    label: Tensor
