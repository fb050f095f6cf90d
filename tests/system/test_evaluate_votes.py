"""`dalle eval votes` shows pairs blind, keeps every answer, and counts majorities as the paper."""

from __future__ import annotations

import errno
import json
import re
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from PIL import Image

import dalle.evaluate as evaluate
from dalle.cli import main
from dalle.data.shapes import scenes
from dalle.data.shapes_pairs import render
from dalle.evaluate.ballots import Ballot, Rule, tally, workers_of
from dalle.evaluate.polling import Poll, start_file
from support.copies_made import picture
from support.evaluation import make_eval_home, refused

HEAD = "task,worker,realistic,match,seconds\n"


def pairs(folder, captions, images):
    folder.mkdir()
    for i, (caption, image) in enumerate(zip(captions, images, strict=True)):
        Image.fromarray(image).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(caption)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """a and b share three of four captions, in another order; c shares none."""
    root = make_eval_home(tmp_path_factory.mktemp("votes"))
    names = ["a cat", "a dog", "a cow", "a pig"]
    pairs(root / "a", names, [picture(i, 32) for i in range(4)])
    pairs(root / "b", ["a bee", *names[:0:-1]], [picture(9 + i, 40) for i in range(4)])
    pairs(root / "c", ["x"], [picture(0, 32)])
    chosen = [s for s in scenes() if not s.relation][::25][:6]
    rng = np.random.default_rng(0)
    pairs(root / "good", [s.caption for s in chosen], [render(s, rng) for s in chosen])
    wrong = [*chosen[1:], chosen[0]]
    pairs(root / "poor", [s.caption for s in chosen], [render(s, rng) for s in wrong])
    return root


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


def test_majorities_splits_and_agreement():
    votes = {1: "ooooo", 2: "oooot", 3: "ttton", 4: "nnnot", 5: "ooott", 6: "oottn", 7: "oo"}
    names = {"o": "ours", "t": "theirs", "n": "neither"}
    given = [
        Ballot(task, f"w{k}", None, names[letter], None)
        for task, letters in votes.items()
        for k, letter in enumerate(letters)
    ]
    found = tally(given, "match", 5)
    counts = {name: one["count"] for name, one in found["majority"].items()}
    assert counts == {"ours": 4, "theirs": 1, "neither": 1, "tie": 1}
    assert found["split"]["ours"] == {"5": 1 / 7, "4": 1 / 7, "3": 1 / 7, "2": 1 / 7}
    assert found["incomplete"] == 1 and found["tasks"] == 7
    # Wilson's interval of 4 of 7, by its formula.
    low, high = found["majority"]["ours"]["interval"]
    assert (low, high) == pytest.approx((0.25047, 0.84178), abs=1e-4)
    # A sixth vote does not count; two raters of two answers give Cohen-like kappa by hand.
    extra = [Ballot(1, f"v{k}", None, "theirs" if k < 3 else "ours", None) for k in range(6)]
    assert tally(extra, "match", 5)["majority"]["theirs"]["count"] == 1
    two = [Ballot(t, w, None, m, None) for t, w, m in
           [(1, "a", "ours"), (1, "b", "ours"), (2, "a", "ours"), (2, "b", "theirs")]]  # fmt: skip
    agreed = tally(two, "match", 5)
    expected = (3 / 4) ** 2 + (1 / 4) ** 2
    assert agreed["agreement"] == 0.5
    assert agreed["kappa"] == pytest.approx((0.5 - expected) / (1 - expected))
    assert tally(two, "realistic", 5)["tasks"] == 0


@pytest.mark.parametrize(
    ("differs", "seconds", "dropped"),
    [(True, 1.0, True), (True, 9.0, False), (False, 1.0, False), (True, None, False)],
)
def test_a_worker_is_dropped_for_disagreement_and_haste_together(differs, seconds, dropped):
    given = [Ballot(t, w, "ours", "ours", 10.0) for t in range(1, 7) for w in "abc"]
    answer = "theirs" if differs else "ours"
    given += [Ballot(t, "z", answer, answer, seconds) for t in range(1, 7)]
    found = workers_of(given, Rule())
    assert found["z"]["dropped"] is dropped and not found["a"]["dropped"]
    assert found["z"]["disagreement"] == float(differs)
    assert not workers_of(given[:18] + given[-1:], Rule())["z"]["dropped"]  # one answer is too few


def test_answers_of_a_file_by_place_and_by_name(home, capsys):
    words = ["eval", "votes", "--ours", "a", "--theirs", "b", "--out", "out"]
    assert main(words) == 0
    assert "3 pairs to show" in capsys.readouterr().out
    tasks = json.loads((home / "out/votes.json").read_text())["tasks"]
    assert [task["caption"] for task in tasks] == ["a dog", "a cow", "a pig"]
    assert "ours" not in (home / "out/votes-tasks.csv").read_text()
    for task in tasks:  # what is shown as picture 1 is what the key says
        size = Image.open(home / f"out/votes-pictures/{task['task']:04}-1.png").size[0]
        assert size == {"ours": 32, "theirs": 40}[task["image_1"]]
    lines = [HEAD]
    for task in tasks:
        ours = 1 if task["image_1"] == "ours" else 2
        answers = [(ours, ours), (ours, "neither"), ("ours", "OURS"), (3 - ours, "theirs"),
                   ("theirs", 3 - ours)]  # fmt: skip
        lines += [f"{task['task']},w{k},{r},{m},{5 + k}\n" for k, (r, m) in enumerate(answers)]
    (home / "out/votes.csv").write_text("".join(lines))
    assert main(words) == 0
    result = json.loads((home / "out/votes.json").read_text())
    real, match = result["questions"]["realistic"], result["questions"]["match"]
    assert real["majority"]["ours"]["count"] == 3 and real["split"]["ours"] == {"3": 1.0}
    assert match["majority"]["tie"]["count"] == 3
    assert result["judge"] == "people" and result["dropped"] == []
    assert Image.open(home / "out/votes.png").size[0] > 500
    text = (home / "out/votes.md").read_text()
    assert "0.9" in text and "by people" in text  # beside the paper's 90 %
    said = refused(capsys, [*words, "--seed", "1"], 2)
    assert "must be those of the votes so far" in said
    assert main(["eval", "report", "--out", "out"]) == 0


def test_automatic_judges_are_named_everywhere(home, capsys):
    assert main(["eval", "votes", "--ours", "good", "--theirs", "poor", "--judge", "checker",
                 "--out", "auto"]) == 0  # fmt: skip
    heard = capsys.readouterr().out
    assert "judged by the checker, not by people" in heard and "warning: the judge" in heard
    result = json.loads((home / "auto/votes.json").read_text())
    assert result["automatic"] and list(result["questions"]) == ["match"]
    assert result["questions"]["match"]["majority"]["ours"]["count"] == 6
    assert "not by people" in (home / "auto/votes.md").read_text()
    got = evaluate.votes("a", "b", judge="ranker", weights="pipe")
    scores = got["judge_scores"]
    ours = sum(x > y for x, y in zip(scores["ours"], scores["theirs"], strict=True))
    assert got["questions"]["match"]["majority"]["ours"]["count"] == ours
    # The scores are those that clip-score has for the same pictures.
    own = evaluate.clip_score("b", weights="pipe", bootstrap=0)["mean_cosine"]
    bee = evaluate.votes("b", "b", judge="ranker", weights="pipe")
    assert np.mean(bee["judge_scores"]["ours"]) == pytest.approx(own, rel=1e-5)
    assert bee["questions"]["match"]["majority"]["tie"]["count"] == 4


def get(address, host=None):
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    return urllib.request.urlopen(request, timeout=10).read()


def post(address, **values):
    data = urllib.parse.urlencode(values).encode()
    return urllib.request.urlopen(address + "vote", data, timeout=10).read().decode()


def field(page, name):
    return re.search(rf"name={name} value='?([^'>]+)", page)[1]


def test_the_page_is_blind_and_keeps_answers(home):
    """Some votes, a stop, and the rest: all are counted."""

    def first(address):
        page = get(address + "?worker=Ann%20%3Cb%3E").decode()
        assert "Ann &lt;b&gt;" in page and not re.search(r"ours|theirs|\bpoor\b|good", page)
        task, token = field(page, "task"), field(page, "token")
        assert get(f"{address}picture/{task}/2")[:4] == b"\x89PNG"
        good = {"token": token, "worker": "Ann <b>", "task": task, "realistic": "2", "match": "1"}
        bad = [{"token": "x"}, {"realistic": "3"}, {"match": ""}, {"task": "99"}, {"worker": "Bo"}]
        for change in bad:
            with pytest.raises(urllib.error.HTTPError) as refusal:
                post(address, **{**good, **change})
            assert refusal.value.code in (400, 403)
        for path in ("picture/9/1", "picture/1/3", "votes.csv", "../votes.csv"):
            with pytest.raises(urllib.error.HTTPError):
                get(address + path)
        with pytest.raises(urllib.error.HTTPError):
            get(address, host="evil.example")
        following = post(address, **good)
        assert field(following, "task") != task
        post(address, **good)  # sent twice, counted once
        raise KeyboardInterrupt

    options = {"out": "served", "serving": True, "port": 0, "each": 1, "count": 2}
    result = evaluate.votes("good", "poor", ready=first, **options)
    lines = (home / "served/votes.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[1].split(",")[1:4] == ["Ann <b>", "2", "1"]
    assert result["questions"]["match"]["tasks"] == 1

    def rest(address):
        page = get(address + "?worker=Bo").decode()
        after = post(address, token=field(page, "token"), worker="Bo", task=field(page, "task"),
                     realistic="1", match="neither")  # fmt: skip
        assert "no more pictures" in after

    result = evaluate.votes("good", "poor", ready=rest, **options)
    assert result["questions"]["match"]["tasks"] == 2
    assert result["questions"]["match"]["majority"]["neither"]["count"] == 1


def test_answers_are_added_in_the_columns_of_the_file(home, capsys):
    def answer(address):
        page = get(address + "?worker=Bo").decode()
        post(address, token=field(page, "token"), worker="Bo", task=field(page, "task"),
             realistic="1", match="neither")  # fmt: skip
        raise KeyboardInterrupt

    path = home / "other.csv"
    path.write_text("note,seconds,match,realistic,worker,task\n,9,ours,theirs,Ann,1")
    options = {"votes": path, "serving": True, "port": 0, "each": 2}
    result = evaluate.votes("a", "b", ready=answer, **options)
    assert result["workers"]["Ann"]["answers"] == result["workers"]["Bo"]["answers"] == 1
    assert path.read_text().splitlines()[2].split(",")[2:5] == ["neither", "1", "Bo"]
    content = "task,worker,realistic,match\n1,Ann,1,1\n"  # a page's answer would not fit
    path.write_text(content)
    words = f"eval votes --ours a --theirs b --votes {path} --serve --port 0 --out lacking"
    assert main(words.split()) == 3 and "votes must have the columns" in capsys.readouterr().err
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("last", "kept"),
    [("2,B", False), ("2,Bo,1,neith", False), ('2,"Bo, Z', False), ("2,J\xc3", False),
     ("2,Bo,1,neither,1", True), ("2,Bo,1,neither,1.5\n", True)],
)  # fmt: skip
def test_a_last_line_that_was_cut_off_is_dropped_and_said(home, capsys, monkeypatch, last, kept):
    """As a power cut leaves it; the answers before it count, and later ones follow."""
    monkeypatch.setattr("dalle.evaluate.preference.votes_png", lambda *_: b"a plot")  # slow
    path = home / "cut/votes.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((HEAD + "1,Ann,1,1,5.0\n" + last).encode("latin-1"))
    before = path.read_bytes()
    words = ["eval", "votes", "--ours", "a", "--theirs", "b", "--out", "cut", "--each", "2"]
    assert main(words) == 0  # only counted: the file is left as it is, since a page may be open
    heard = capsys.readouterr().err
    assert ("cut/votes.csv was cut off and is dropped: 2," in heard) is not kept
    assert path.read_bytes() == before

    def answer(address):
        page = get(address + "?worker=Cy").decode()
        post(address, token=field(page, "token"), worker="Cy", task=field(page, "task"),
             realistic="1", match="neither")  # fmt: skip
        raise KeyboardInterrupt

    options = {"out": "cut", "serving": True, "port": 0, "each": 2}
    result = evaluate.votes("a", "b", ready=answer, **options)
    assert set(result["workers"]) == ({"Ann", "Bo", "Cy"} if kept else {"Ann", "Cy"})
    assert capsys.readouterr().err.count("was cut off") == (0 if kept else 1)
    lines = path.read_text().splitlines()
    assert len(lines) == (4 if kept else 3) and lines[-1].split(",")[1] == "Cy"


def test_a_disk_that_fills_up_leaves_no_half_of_an_answer(home, monkeypatch):
    path = home / "full.csv"
    poll = Poll(["x"], lambda *_: b"", [False], 2, 0, path, [])
    poll.columns = start_file("t", path)
    poll.shown["Ann", 0] = 0.0

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dalle.evaluate.polling.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        poll.answer("Ann", 0, "1", "2")
    assert path.read_text() == HEAD and not poll.given
    monkeypatch.undo()
    poll.answer("Ann", 0, "1", "2")
    assert path.read_text().splitlines()[1].startswith("1,Ann,1,2,")
    path.write_text(HEAD[:9])  # the head itself was cut
    assert start_file("t", path) == HEAD.strip().split(",") and path.read_text() == HEAD


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "must have the columns task, worker, realistic, match, seconds, once each, got none"),
        (HEAD, "votes must hold an answer, got none"),
        ("task,worker\n1,a\n", "must have the columns"),
        ("task,task,worker,realistic,match\n", "once each"),
        (HEAD + "0,w,1,1,5\n", "line 2: task must be 1 to 3, got '0'"),
        (HEAD + "1,w,1,1,5\n4,w,1,1,5\n", "line 3: task must be 1 to 3, got '4'"),
        (HEAD + "x,w,1,1,5\n", "task must be 1 to 3, got 'x'"),
        (HEAD + "1,,1,1,5\n", "worker must be a name"),
        (HEAD + "1,w,neither,1,5\n", "realistic must be 1, 2, ours or theirs, got 'neither'"),
        (HEAD + "1,w,1,both,5\n", "match must be 1, 2, ours, theirs or neither, got 'both'"),
        (HEAD + "1,w,1,1,-5\n", "seconds must be 0 or more, got '-5'"),
        (HEAD + "1,w,1,1,nan\n", "seconds must be 0 or more, got 'nan'"),
        (HEAD + "1,w,1\n", "must have as many fields as the head"),
        (HEAD + "1,w,1,1,5,6\n", "must have as many fields as the head"),
        (HEAD + "1,w,1,1,5\n1,w,2,2,5\n", "line 3: a worker must answer a task once"),
        (b"\xff\xfe\n", "votes must be UTF-8"),
    ],
)
def test_a_bad_line_is_named(home, capsys, content, line):
    data = content if isinstance(content, bytes) else content.encode()
    (home / "bad.csv").write_bytes(data)
    words = ["eval", "votes", "--ours", "a", "--theirs", "b", "--votes", "bad.csv", "--out", "bad"]
    said = refused(capsys, words, 3)
    assert line in said and said.startswith("dalle: eval votes: ") or said.startswith("eval votes")


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--theirs", "c"], 3, "ours and theirs must share captions, got none of 4 and 1"),
        (["--theirs", "fake"], 3, "theirs must have captions, got none in fake"),
        (["--theirs", "empty"], 3, "theirs must hold pictures, got none in empty"),
        (["--theirs", "b", "--votes", "nowhere.csv"], 3, "votes must be a readable CSV file"),
        (["--theirs", "b", "--votes", "empty"], 3, "votes must be a readable CSV file"),
        (["--theirs", "b", "--judge", "me"], 2, "judge must be one of ranker, clip, checker"),
        (["--theirs", "b", "--judge", "checker"], 3, "captions must be of the set shapes"),
        (["--theirs", "b", "--judge", "ranker", "--serve"], 2, "of people or of a judge"),
        (["--theirs", "b", "--each", "0"], 2, "each must be 1 or more, got 0"),
        (["--theirs", "b", "--port", "70000"], 2, "port must be at most 65535, got 70000"),
        (["--theirs", "b", "--max-fast", "2"], 2, "fast must be 0 to 1, got 2"),
        (["--theirs", "b", "--count", "0"], 2, "count must be 1 or more, got 0"),
    ],
)
def test_bad_options_get_one_line(capsys, words, code, line):
    said = refused(capsys, ["eval", "votes", "--ours", "a", "--out", "no", *words], code)
    assert line in said, said
