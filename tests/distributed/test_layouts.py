"""A checkpoint of any layout is read by any other: the same tensors bit for bit, and the same training after it."""

from __future__ import annotations

from itertools import product

import pytest

from tests.distributed.layouts import Layout
from tests.distributed.moves import Moves

PLACES = {
    f"{data}p-zero{zero}": Layout(family="llama", data=data, zero=zero, accumulation=2 // data)
    for data, zero in product((1, 2), (0, 1, 2, 3))
}
# Each writes once and reads once.
MOVES = [
    ("1p-zero0", "2p-zero3"),
    ("1p-zero1", "2p-zero2"),
    ("1p-zero2", "2p-zero1"),
    ("1p-zero3", "2p-zero0"),
    ("2p-zero0", "1p-zero2"),
    ("2p-zero1", "1p-zero0"),
    ("2p-zero2", "1p-zero3"),
    ("2p-zero3", "1p-zero1"),
]
ODD = ("model.d_ff=37",)
"""ZeRO-3 must pad its parts."""


def test_what_one_layout_wrote_another_holds_bit_for_bit_and_goes_on_from(configured, tmp_path):
    moves = Moves(PLACES, MOVES, tmp_path, configured, ODD)
    moves.check(moves.measure())


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_every_layout_reads_every_layout(configured, tmp_path):
    moves = Moves(PLACES, list(product(PLACES, PLACES)), tmp_path, configured, ODD)
    moves.check(moves.measure())
