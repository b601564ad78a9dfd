"""Percentiles come from records: within 1 % of the true ones, while a histogram's are as wrong as the docs say."""

import runpy
from pathlib import Path

HOME = Path(__file__).parent.parent


def test_percentiles_from_records_are_right_and_the_docs_tell_how_wrong_a_histograms_are():
    script = runpy.run_path(str(HOME / "benchmarks" / "percentiles.py"))
    found = script["errors"]()
    assert set(found["queue.records()"]) == {0.5, 0.9, 0.95, 0.99}
    assert all(abs(error) <= 0.01 for errors in found["queue.records()"].values() for error in errors)
    assert max(map(abs, found["doubling buckets"][0.99])) > 0.15
    assert all(abs(error) <= 0.02 for errors in found["exponential histogram"].values() for error in errors)
    assert script["table"](found) in (HOME / "docs" / "telemetry.md").read_text()
