"""`dalle demo`: from nothing to drawn captions in minutes."""

from __future__ import annotations

from dalle.demo.config import DemoConfig


def demo(config: DemoConfig) -> None:
    """Runs the demo and prints where its page is."""
    from dalle.commands.training import require_one_process
    from dalle.demo.run import closing_lines, run_demo

    require_one_process("demo")
    print(closing_lines(config.out, "demo", run_demo(config)))
