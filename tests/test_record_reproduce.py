"""The recorded times of `dalle reproduce`: all figures in ten minutes, or the record says no."""

from __future__ import annotations

from pathlib import Path

from record_reproduce import LIMIT, summary


def test_a_run_counts_where_all_is_made_within_the_limit():
    figures = {
        "figure_1": {"seconds": 1.5, "missing": ""},
        "figure_2": {"seconds": 2.0, "missing": "No COCO here."},
    }
    model = Path("demo") / "pipeline"
    run, rows = summary(model, figures, 5.04)
    assert run == {"model": "demo/pipeline", "seconds": 5.0, "figures": 3.5, "not_made": [],
                   "within_limit": True}  # fmt: skip
    assert rows[1] == {"model": "demo/pipeline", "figure": "figure_2", "seconds": 2.0}
    assert not summary(model, figures, LIMIT + 1)[0]["within_limit"]
    figures["figure_2"]["missing"] = "Not made: no memory"
    run, _ = summary(model, figures, 5.0)
    assert run["not_made"] == ["figure_2"] and not run["within_limit"]
