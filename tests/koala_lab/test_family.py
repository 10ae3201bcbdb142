"""The relations of our methods to others hold to rounding, and would not if a coefficient were another."""

from __future__ import annotations

import pytest

from koala_lab.theory.family import RELATIONS, Relation

each = pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: f"{r.ours}, {r.condition}"[:50])


@each
def test_the_two_methods_take_the_same_path(relation: Relation) -> None:
    assert relation.gap(1.0) < 1e-12


@each
def test_a_step_that_is_longer_by_a_millionth_shows(relation: Relation) -> None:
    assert relation.gap(1 + 1e-6) > 1e-8


def test_there_are_as_many_as_the_notebook_says() -> None:
    assert len(RELATIONS) >= 14
    assert len({r.gap for r in RELATIONS}) == len(RELATIONS)
    assert all(r.why.count(r"\\") <= 2 for r in RELATIONS)
