"""`PowerSGD.report()`: times, bytes and advice, measured without waiting for the device."""

from __future__ import annotations

import time

import torch

from dalle.distributed.traffic import CommStats

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Event:
    """As `torch.cuda.Event`, of a device whose clock is `now` and which has got to `reached`."""

    now, reached = 0.0, 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def query(self):
        return self.at <= Event.reached

    def synchronize(self):
        Event.reached = max(Event.reached, self.at)

    def elapsed_time(self, end):
        assert self.query() and end.query()
        return 1e3 * (end.at - self.at)


def test_time_on_the_cpu():
    stats = CommStats()
    with stats.timed("seconds", CPU), stats.timed("exchange_seconds", CPU):
        time.sleep(0.01)
    assert stats.seconds >= stats.exchange_seconds >= 0.01


def test_time_on_a_device_is_read_when_it_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "now", 0.0)
    monkeypatch.setattr(Event, "reached", 0.0)
    stats = CommStats()
    for seconds in (2.0, 3.0, 5.0):
        with stats.timed("exchange_seconds", CUDA):
            Event.now += seconds
    assert stats.exchange_seconds == 0.0  # nobody waited
    Event.reached = 5.0
    with stats.timed("seconds", CUDA):
        Event.now += 7.0
    assert (stats.seconds, stats.exchange_seconds) == (0.0, 5.0)
    stats.traffic.sent, stats.uncompressed_bytes = 10_000_000, 40_000_000
    report = stats.report()  # which waits
    assert (report["seconds"], report["exchange_seconds"]) == (7.0, 10.0)
    advice = "compression pays at 8 Mbit/s: 7000 ms so far; fp32 gradients would take 40000 ms"
    assert report["advice"] == advice and report["compression"] == 4.0


def test_advice_where_the_link_is_fast():
    stats = CommStats(uncompressed_bytes=100, seconds=1.0, exchange_seconds=0.001)
    stats.traffic.sent = 1000
    assert stats.report()["advice"].startswith("compression does not pay at 8 Mbit/s: 1000 ms")
