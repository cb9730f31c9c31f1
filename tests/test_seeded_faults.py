"""The list of seeded faults fits the code; `python -m tests.support.seeded_faults` runs the tests against each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.seeded_faults import FAULTS, ROOT, SeededFault


@pytest.mark.parametrize("seeded", FAULTS, ids=lambda seeded: seeded.name)
def test_a_seeded_fault_changes_one_place_of_the_product(seeded: SeededFault, tmp_path: Path) -> None:
    before = (ROOT / seeded.file).read_text(encoding="utf-8")
    (tmp_path / seeded.file).parent.mkdir(parents=True)
    (tmp_path / seeded.file).write_text(before, encoding="utf-8")
    seeded.apply(tmp_path)
    assert (tmp_path / seeded.file).read_text(encoding="utf-8") != before
    assert all((ROOT / test).exists() for test in seeded.tests)


def test_thirty_faults_of_different_names_are_seeded() -> None:
    assert len({seeded.name for seeded in FAULTS}) == len(FAULTS) >= 30
