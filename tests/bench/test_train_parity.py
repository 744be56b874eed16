"""A few steps of the whole trainer follow peft + trl's; bench/train.py does sixty."""

import pytest

pytest.importorskip("trl", reason="the loss curves are compared with trl's")

from bench.train_parity import METHODS, measure_parity  # after the check


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_losses_follow_those_of_peft_and_trl(method):
    row = measure_parity("float32", method, 4)
    assert row["largest_difference"] < 1e-5
    assert len(set(row["herd"])) == 4
