"""Faults in the wiring are seen by the tests they name; all of them in `make test-long`."""

import pytest

from tests.mutants import MUTANTS, ROOT, failures, judge_all, mutated, sampled


def test_every_fault_stands_in_the_tree_as_it_is():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    for mutant in MUTANTS:
        assert mutant.old.count("\n") <= 1 and mutated(mutant) != (ROOT / mutant.file).read_text()
        for test in mutant.tests:
            assert (ROOT / test.partition("::")[0]).is_file(), f"{mutant.name}: {test}"


@pytest.mark.slow
def test_a_sample_of_the_faults_is_seen():
    assert failures(judge_all(sampled(8, seed=0))) == []


@pytest.mark.slow  # not one of the default tests either
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_all_faults_are_seen():
    assert failures(judge_all(MUTANTS)) == []
