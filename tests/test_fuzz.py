"""Readers of files that others wrote, fed with broken ones; ``tests/robustness/fuzz.py`` does it a million times."""

import random
import tracemalloc

import pytest
from fuzz_targets import BOMBS, CONSTANT, Room, drawn, large_inputs, mutated, targets
from hypothesis import HealthCheck, given, seed, settings

TARGETS = targets()
INPUTS = 60
DRAWN = 25


@pytest.fixture(params=TARGETS)
def room(request):
    with Room(TARGETS[request.param]) as room:
        yield room


def test_valid_files_are_accepted_and_broken_ones_refused_by_our_error_only(room):
    bombs = [bomb.encode() for bomb in BOMBS]
    for data in room.target.valid:
        assert room.is_accepted(data) != any(bomb.split(b"\n")[0] in data for bomb in bombs)
    accepted = [room.is_accepted(mutated(room.target, random.Random(f"test {number}"))) for number in range(INPUTS)]
    assert not all(accepted)


def test_so_is_anything_else(room):
    @seed(0)
    @settings(max_examples=DRAWN, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(drawn(room.target))
    def read(data):
        room.is_accepted(data)

    read()


def test_memory_is_bounded_by_size():
    """On inputs that are made to take much, none of which is a table of tiny cells that all differ (see the script)."""
    for name, what, data in large_inputs(1 << 15):
        if "differ" in what or "every cell another" in what:
            continue
        with Room(TARGETS[name]) as room:
            room.is_accepted(room.target.valid[0])
            tracemalloc.start()
            room.is_accepted(data)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak <= 10 * len(data) + CONSTANT, (name, what, peak / len(data))
