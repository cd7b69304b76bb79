"""Mutations take minutes each and run by hand; that their edits still fit the source is seen here."""

from __future__ import annotations

from dataclasses import replace

import mutations_cpu
import mutations_cuda
import pytest
from mutation_suite import Suite, stale


@pytest.mark.parametrize("suite", [mutations_cpu.SUITE, mutations_cuda.SUITE], ids=["cpu", "cuda"])
def test_every_mutation_finds_what_it_replaces(suite: Suite) -> None:
    assert len(suite.mutations) > 0
    assert stale(suite.mutations) == []


def test_a_mutation_of_what_is_gone_is_named() -> None:
    mutation = replace(mutations_cpu.SUITE.mutations[0], name="gone", old="no such text")
    assert len(stale([mutation])) == 1
    assert stale([mutation])[0].startswith("gone: ")
    assert len(stale([replace(mutation, file="no such file")])) == 1
