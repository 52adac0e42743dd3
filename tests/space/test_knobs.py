"""Knobs: values on a grid, inside the range, and the way back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.space.knobs import Knob
from tests.space.models import PROPERTY

units = st.floats(0.0, 1.0)
decimals = st.integers(-5_000_000, 5_000_000).map(lambda n: n / 1_000_000)


def knob(kind="float", low=0.0, high=1.0, scale="linear", choices=()):
    return Knob("k", kind, low, high, low, scale, choices)


@st.composite
def knobs(draw):
    kind = draw(st.sampled_from(["float", "log", "int", "int log", "choice"]))
    if kind == "choice":
        choices = (False, True) if draw(st.booleans()) else (0.25, 3, -1, 2.5)
        return knob("choice", 0, len(choices) - 1, choices=choices)
    if kind == "float":
        low, high = sorted(draw(st.tuples(decimals, decimals).filter(lambda p: p[0] != p[1])))
        return knob("float", low, high)
    if kind == "log":
        low = float(f"{10.0 ** draw(st.floats(-9, 3)):.6g}")
        return knob("float", low, float(f"{low * draw(st.floats(1.001, 1e6)):.6g}"), "log")
    low = draw(st.integers(1 if kind == "int log" else -50, 50))
    high = low + draw(st.integers(1, 200))
    return knob("int", low, high, "log" if kind == "int log" else "linear")


@PROPERTY
@given(knobs(), units)
def test_values_stay_in_range_and_come_back(knob, unit):
    value = knob.value(unit)
    if knob.kind == "choice":
        assert value in knob.choices
        assert type(value) is type(knob.choices[knob.choices.index(value)])
    else:
        assert knob.low <= value <= knob.high
        assert isinstance(value, int if knob.kind == "int" else float)
    assert 0.0 <= knob.unit(value) <= 1.0
    again = knob.value(knob.unit(value))
    assert again == value
    assert knob.unit(again) == knob.unit(value)


@PROPERTY
@given(decimals, st.integers(1, 10_000_000), units)
def test_linear_values_are_the_nearest_millionth(low, width, unit):
    high = round(low + width / 1e6, 6)
    value = knob("float", low, high).value(unit)
    assert repr(value) == repr(round(value, 6))
    exact = low + unit * (high - low)
    assert abs(value - exact) <= 0.5e-6 + 1e-12  # half a step, and the rounding of the sum itself


@PROPERTY
@given(units)
def test_log_values_have_six_digits_and_follow_the_logarithm(unit):
    value = knob("float", 1e-5, 10.0, "log").value(unit)
    assert float(f"{value:.6g}") == value
    # six significant digits: relative half step up to 5e-6
    assert math.log10(value) == pytest.approx(-5 + 6 * unit, abs=5e-6)


@pytest.mark.parametrize("span", [knob("int", -1, 2), knob("choice", 0, 3, choices=(7, 5, 3, 1))])
def test_whole_numbers_and_choices_get_equal_shares(span):
    values = [span.value((i + 0.5) / 400) for i in range(400)]
    assert [values.count(value) for value in dict.fromkeys(values)] == [100] * 4
    assert span.value(0.0) == values[0]
    assert span.value(1.0) == values[-1]


def test_log_whole_numbers_get_shares_of_the_logarithm():
    span = knob("int", 1, 7, "log")
    share = [sum(span.value((i + 0.5) / 9000) == n for i in range(9000)) / 9000 for n in (1, 2, 7)]
    wanted = [math.log((n + 1) / n) / math.log(8) for n in (1, 2, 7)]
    assert share == pytest.approx(wanted, abs=2e-4)  # the samples are 1/9000 apart


def test_values_never_leave_the_range_by_rounding():
    assert knob("float", 0.3, 0.300001).value(0.49) == 0.3
    assert knob("float", 0.3, 0.300001).value(0.51) == 0.300001
    assert knob("float", 1.00003, 3.0, "log").value(1e-9) == 1.00003


def test_there_is_one_zero():
    value = knob("float", -1.0, 1.0).value(0.5 - 1e-8)
    assert math.copysign(1.0, value) == 1.0
    assert value == 0.0
