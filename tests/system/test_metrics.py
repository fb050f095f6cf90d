"""metrics.jsonl: one record an interval, repaired after a crash; a full disk ends no run."""

from __future__ import annotations

import errno
import json
import math
import os
import sys

import pytest
import torch

from dalle.console import duration
from dalle.errors import DataError, EnvironmentProblem
from dalle.precision.plots import plot_scales
from dalle.train import metrics
from dalle.train.loop import train
from dalle.train.metrics import Metrics, read_metrics
from support.tiny_task import TinyTask, config


def test_one_record_per_interval_with_all_keys(tmp_path):
    train(TinyTask(), config(tmp_path, steps=7, log_every=3))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [3, 6, 7]
    keys = {"step", "loss", "grad_norm", "lr", "steps_per_second", "images_per_second"}
    assert all(set(r) == keys | {"seconds", "eta"} for r in records)
    assert records[-1]["eta"] == 0 and records[0]["eta"] > 0
    for record in records:
        ratio = record["images_per_second"] / record["steps_per_second"]
        assert ratio == pytest.approx(8)
    assert records[0]["lr"] == pytest.approx(0.05 * 3 / 4)


def test_values_are_means_over_the_interval(tmp_path):
    log = Metrics(tmp_path, name="x", start=0, steps=4)
    log.add({"loss": torch.tensor(1.0), "rare": 7})
    log.add({"loss": 3.0})
    first = log.write(2, 0.1)
    log.add({"loss": 5.0})
    second = log.write(3, 0.1)
    log.close()
    assert (first["loss"], first["rare"]) == (2.0, 7.0)
    assert second["loss"] == 5.0 and "rare" not in second and log.last == second


def test_lines_are_there_at_once(tmp_path):
    log = Metrics(tmp_path, name="x", start=0, steps=4)
    log.add({"loss": 1.0})
    log.write(1, 0.1)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    log.close()


def test_nonfinite_values_are_null_not_broken_json(tmp_path):
    log = Metrics(tmp_path, name="x", start=0, steps=4)
    log.add({"loss": 1.0, "psnr": math.inf})
    log.write(1, 0.1)
    log.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert record["psnr"] is None


def test_records_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": s}) for s in (2, 4, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 8, "lo')
    log = Metrics(tmp_path, name="x", start=4, steps=8)
    log.add({"loss": 0.5})
    log.write(5, 0.1)
    log.close()
    assert [r["step"] for r in read_metrics(path)] == [2, 4, 5]


def test_log_lines_without_a_terminal(tmp_path, capsys):
    train(TinyTask(), config(tmp_path, steps=6, log_every=3))
    # The last line of so short a run is about its averaged weights.
    lines = capsys.readouterr().err.splitlines()[:-1]
    assert len(lines) == 2 and lines[0].startswith("tiny 3/6 loss ")
    assert "steps/s, ETA 0:0" in lines[0]


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(TinyTask(), config(tmp_path, steps=6, log_every=3))
    shown = capsys.readouterr().err
    assert "tiny: " in shown and "6/6" in shown and "steps/s, ETA" not in shown


def test_a_full_disk_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    class Full:
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):  # flushes what `write` could not
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics, "open", lambda *a, **k: Full(), raising=False)
    assert train(TinyTask(), config(tmp_path)).step == 20
    assert capsys.readouterr().err.count("No space left on device") == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3599.9, "1:00:00"), (90061, "25:01:01")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


DAMAGE = [
    b'{"step": 8, "lo',
    b"\x00" * 100,
    b'{"step": "\xff"}\n',
    b"[1, 2]\n3\nnull\n",
    b'{"step": "4"}\n{"loss": 1}\n{"step": true}\n{"step": -1}\n{"step": 1e300}\n',
    b'{"step": 3, "loss": "low"}\n{"step": 3, "block_scale": [{}]}\n',
    b"[" * 50_000 + b"\n",
    b'{"step": 3, "loss": 1' + b"0" * 400 + b"}\n",
    b"\xef\xbb\xbf\xfe\xff\n",
]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_tail_is_cut_and_said_and_training_goes_on(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 2, "loss": 0.5}\n' + damage)
    log = Metrics(tmp_path, name="x", start=4, steps=8)
    log.add({"loss": 0.5})
    log.write(5, 0.1)
    log.close()
    assert [r["step"] for r in read_metrics(path)] == [2, 5]
    said = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl: left out" in said[0] and len(said) == 2


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/full", "pipe"])
def test_metrics_that_are_no_file_are_refused_before_the_training(tmp_path, target):
    if target == "pipe":
        target = tmp_path / "pipe"
        os.mkfifo(target)
    (tmp_path / "metrics.jsonl").symlink_to(target)
    with pytest.raises(EnvironmentProblem, match="metrics.jsonl must be writable, got it is a"):
        Metrics(tmp_path, name="x", start=0, steps=8)


def test_a_record_that_a_full_disk_took_a_part_of_spoils_no_other(tmp_path, monkeypatch, capsys):
    log = Metrics(tmp_path, name="x", start=0, steps=8)
    for step in (1, 2, 3):
        log.add({"loss": 0.5})
        log.write(step, 0.1)
        if step == 1:
            monkeypatch.setattr(log, "_file", Torn(log._file))
    log.close()
    damaged = []
    records = read_metrics(tmp_path / "metrics.jsonl", damaged)
    assert ([r["step"] for r in records], damaged) == ([1, 3], [2])
    assert capsys.readouterr().err.count("No space left on device") == 1


class Torn:
    """A file that takes 9 bytes the first time."""

    def __init__(self, file):
        self.file, self.close, self.times = file, file.close, 0

    def write(self, line):
        self.times += 1
        return self.file.write(line[:9] if self.times == 1 else line)


@pytest.mark.parametrize(
    "damage",
    [
        {"block_scale": 3},
        {"block_scale": [1.0]},
        {"block_scale": [1e308, -1e308]},
        {"block_scale": [None, 1.0]},
        {"block_overflow": [math.inf, 0.0]},
        {"block_subnormal": None},
        {"block_exponents": 3},
        {"block_exponents": [[], []]},
        {"block_exponents": [[1.0, 2.0], [1.0]]},
        {"block_exponents": [[0.5] * 80] * 3},
        {"block_exponents": [[None] * 80] * 2},
    ],
)
def test_a_plot_leaves_out_records_that_are_not_whole(tmp_path, damage):
    names = ("block_scale", "block_underflow", "block_subnormal", "block_overflow")
    record = {"step": 1, **{name: [1.0, 2.0] for name in names}} | damage
    with pytest.raises(DataError, match="must hold block_scale, got none that is whole"):
        plot_scales([record], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
