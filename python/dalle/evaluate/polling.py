"""A small page that asks for votes: http.server on this machine only, answers to a CSV file."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
import random
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from dalle.console import say
from dalle.errors import DataError, EnvironmentProblem
from dalle.evaluate.ballots import COLUMNS, LONGEST_NAME, Ballot, chosen, without_cut_line
from dalle.files import read_bytes, regular_opener
from dalle.pages import html_page

HOST = "127.0.0.1"
MOST_BYTES = 10_000  # of a form
STYLE = """
body { max-width: 46rem; }
.two { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.two figure { margin: 0; flex: 1 1 16rem; max-width: 22rem; }
.two img { width: 100%; image-rendering: auto; border: 1px solid #ddd; }
.caption { font-size: 1.25rem; margin: 1rem 0 .5rem; }
fieldset { border: 0; padding: 0; margin: 1.2rem 0; } legend { font-weight: bold; padding: 0; }
label { display: inline-block; padding: .45rem 1rem; margin: .4rem .5rem 0 0;
  border: 1px solid #bbb; border-radius: .4rem; cursor: pointer; }
label:has(input:checked) { background: #e4efff; border-color: #2b6cb0; }
button, input[type=text] { font: inherit; padding: .45rem 1.2rem; border-radius: .4rem;
  border: 1px solid #2b6cb0; }
button { background: #2b6cb0; color: #fff; cursor: pointer; }
.done { color: #555; }
"""


class Poll:
    """Tasks, the answers so far, and the file that takes them.

    Args:
        captions: of each task.
        pictures: called with (task from 0, 1 or 2): the PNG that is shown there.
        swapped: of each task, whether picture 1 is theirs.
        each: votes a task.
        seed: of the order of each worker's tasks.
        path: the CSV file; answers are added.
        ballots: those that it holds.
    """

    def __init__(
        self,
        captions: Sequence[str],
        pictures: Callable[[int, int], bytes],
        swapped: Sequence[bool],
        each: int,
        seed: int,
        path: Path,
        ballots: Sequence[Ballot],
    ) -> None:
        self.captions, self.pictures, self.swapped = captions, pictures, swapped
        self.each, self.seed, self.path = each, seed, path
        self.lock = threading.Lock()
        self.shown: dict[tuple[str, int], float] = {}  # when a task was first shown to a worker
        self.given = {(ballot.worker, ballot.task - 1) for ballot in ballots}
        self.counts = Counter(task for _, task in self.given)
        self.columns: Sequence[str] = COLUMNS  # as the head of the file orders them
        self.token = secrets.token_hex(8)  # of the forms: no other page's form is taken

    def left(self) -> int:
        """Votes that are missing."""
        return sum(max(0, self.each - self.counts[task]) for task in range(len(self.captions)))

    def next_task(self, worker: str) -> int | None:
        """The next task of a worker, in an order of their own; None at the end."""
        order = list(range(len(self.captions)))
        random.Random(f"{self.seed} {worker}").shuffle(order)
        for task in order:
            if (worker, task) not in self.given and self.counts[task] < self.each:
                return task
        return None

    def answer(self, worker: str, task: int, realistic: str, match: str) -> None:
        """Adds an answer to the file, on the disk when this returns; a second one is dropped.

        Raises:
            DataError: not an answer to a task that was shown to this worker.
            OSError: the file cannot be written.
        """
        now = time.monotonic()
        with self.lock:
            if (worker, task) in self.given:
                return
            if (worker, task) not in self.shown:
                raise DataError("the task must be one that was shown to you")
            chosen("answer", "realistic", realistic, self.swapped[task])
            chosen("answer", "match", match, self.swapped[task])
            seconds = now - self.shown[worker, task]
            row = (task + 1, worker, realistic, match, f"{seconds:.1f}")
            cells = dict(zip(COLUMNS, row, strict=True))
            text = io.StringIO()
            csv.DictWriter(text, self.columns, lineterminator="\n").writerow(cells)
            with open(self.path, "ab", buffering=0, opener=regular_opener) as file:
                before = os.fstat(file.fileno()).st_size
                try:
                    line = text.getvalue().encode()
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file.fileno())
                except OSError:  # a full disk: no half of a line stays before the next answer
                    with contextlib.suppress(OSError):
                        os.ftruncate(file.fileno(), before)
                    raise
            self.given.add((worker, task))
            self.counts[task] += 1


def start_file(owner: str, path: Path) -> list[str]:
    """Writes the head of a new file of answers, or of one that ends in its head.

    Returns:
        The columns in the order of the file, which an added answer must follow.

    Raises:
        DataError: the head of a file that is there lacks a column.
        OSError: the file cannot be read or written.
    """
    head = ",".join(COLUMNS) + "\n"
    if not path.exists() or head.encode().startswith(read_bytes(path)):
        path.write_text(head)
    content = read_bytes(path)
    head = content.decode("utf-8-sig", "replace").splitlines()[0]
    columns = [name.strip() for name in next(csv.reader([head]), [])]
    missing = [name for name in COLUMNS if name not in columns]
    if missing or len(set(columns)) != len(columns):
        raise DataError(
            f"{owner}: votes must have the columns {', '.join(COLUMNS)}, once each, to add answers "
            f"to, got {', '.join(columns) or 'none'} in {path}"
        )
    if not content.endswith(b"\n"):
        with open(path, "ab", opener=regular_opener) as file:
            file.write(b"\n")
    return columns


def drop_cut_line(owner: str, path: Path, swapped: Sequence[bool]) -> None:
    """Removes a last line from a file of answers that was cut off while it was written.

    Raises:
        OSError: the file cannot be read or written.
    """
    if path.exists():
        content = read_bytes(path)
        kept = without_cut_line(owner, path, content, swapped)
        if kept != content:
            os.truncate(path, len(kept))


def form(poll: Poll, worker: str, task: int) -> bytes:
    """The page of a task: caption, two pictures, two questions; nothing says whose they are."""
    done = sum(name == worker for name, _ in poll.given)
    figures = "".join(
        f"<figure><img src='/picture/{task + 1}/{place}' alt='image {place}'>"
        f"<figcaption>image {place}</figcaption></figure>"
        for place in (1, 2)
    )

    def question(name: str, words: str, answers: Sequence[str]) -> str:
        choices = "".join(
            f"<label><input type=radio name={name} value={a} required> "
            f"{a if a == 'neither' else f'image {a}'}</label>"
            for a in answers
        )
        return f"<fieldset><legend>{words}</legend>{choices}</fieldset>"

    parts = [
        f"<p class=done>{escape(worker)}: {done} of {len(poll.captions)} answered</p>",
        f"<p class=caption>&ldquo;{escape(poll.captions[task])}&rdquo;</p>",
        f"<div class=two>{figures}</div>",
        "<form method=post action=/vote>",
        f"<input type=hidden name=token value={poll.token}>"
        f"<input type=hidden name=worker value='{escape(worker, quote=True)}'>"
        f"<input type=hidden name=task value={task + 1}>",
        question("realistic", "Which image is more realistic?", ("1", "2")),
        question("match", "Which image matches the caption better?", ("1", "2", "neither")),
        "<button>Next</button></form>",
    ]
    return html_page("Which picture?", parts, STYLE)


def welcome(note: str = "") -> bytes:
    """The first page: a name."""
    parts = [
        f"<p class=note>{escape(note)}</p>" if note else "",
        "<p>You will see a caption with two images, and two questions about them.</p>",
        "<form method=get action=/><p><label style='border:0;padding:0'>Your name or number: "
        f"<input type=text name=worker maxlength={LONGEST_NAME} required autofocus></label> "
        "<button>Begin</button></p></form>",
    ]
    return html_page("Which picture?", parts, STYLE)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "dalle", ""
    timeout = 30

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal shows votes only."""

    def _send(
        self, content: bytes, kind: str = "text/html; charset=utf-8", code: int = 200
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        policy = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; form-action 'self'"
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, code: HTTPStatus, words: str) -> None:
        self._send(html_page("Which picture?", [f"<p class=note>{escape(words)}</p>"]), code=code)

    def _local(self) -> bool:
        """Whether the browser was pointed here by its own user, and not by a foreign name."""
        port = self.server.server_address[1]
        return self.headers.get("Host") in (f"{HOST}:{port}", f"localhost:{port}")

    def do_GET(self) -> None:
        poll, url = self.server.poll, urlsplit(self.path)
        if not self._local():
            return self._refuse(HTTPStatus.FORBIDDEN, "This page is for this machine only.")
        words = url.path.strip("/").split("/")
        if words[0] == "picture" and len(words) == 3 and words[1].isdecimal():
            task = int(words[1][:9]) - 1
            if 0 <= task < len(poll.captions) and words[2] in ("1", "2"):
                return self._send(poll.pictures(task, int(words[2])), "image/png")
        if url.path != "/":
            return self._refuse(HTTPStatus.NOT_FOUND, "There is no such page.")
        worker = parse_qs(url.query).get("worker", [""])[0].strip()
        if not worker or len(worker) > LONGEST_NAME or not worker.isprintable():
            return self._send(welcome("Please give a short name." if worker else ""))
        with poll.lock:
            task_left = poll.next_task(worker)
            if task_left is not None:
                poll.shown.setdefault((worker, task_left), time.monotonic())
        if task_left is None:
            return self._send(html_page("Thank you", ["<p>There are no more pictures.</p>"], STYLE))
        return self._send(form(poll, worker, task_left))

    def do_POST(self) -> None:
        poll = self.server.poll
        length = self.headers.get("Content-Length", "")
        if not self._local() or self.path != "/vote" or not length.isdecimal():
            return self._refuse(HTTPStatus.FORBIDDEN, "This page takes votes only.")
        if int(length[:9]) > MOST_BYTES:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The form is too large.")
        sent = parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"))
        values = {name: entries[0].strip() for name, entries in sent.items()}
        if values.get("token") != poll.token:
            return self._refuse(HTTPStatus.FORBIDDEN, "The form is of another session: begin anew.")
        worker, word = values.get("worker", ""), values.get("task", "")
        try:
            task = int(word) - 1 if word.isdecimal() and len(word) < 10 else -1
            poll.answer(worker, task, values.get("realistic", ""), values.get("match", ""))
        except DataError as problem:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(problem))
        except OSError as problem:
            say(f"eval votes: {poll.path} must be writable, got {problem.strerror}")
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "The answer could not be kept.")
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", f"/?worker={quote(worker)}")
        self.send_header("Content-Length", "0")
        self.end_headers()
        if poll.left() == 0:
            self.server.complete.set()
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    address_family = socket.AF_INET

    def __init__(self, port: int, poll: Poll) -> None:
        self.poll, self.complete = poll, threading.Event()
        super().__init__((HOST, port), _Handler)


def serve(owner: str, poll: Poll, port: int, ready: Callable[[str], None] | None = None) -> bool:
    """Asks until all votes are there, or Ctrl-C; answers are in the file as they come.

    Args:
        owner: begins the line of an error.
        poll: the tasks.
        port: of 127.0.0.1; 0 takes a free one.
        ready: called with the address once it answers.

    Returns:
        Whether all votes are there.

    Raises:
        DataError: the file of answers lacks a column.
        EnvironmentProblem: the port is taken, or the file cannot be written.
    """
    try:
        poll.columns = start_file(owner, poll.path)
    except OSError as problem:
        reason = problem.strerror
        raise EnvironmentProblem(
            f"{owner}: {poll.path} must be writable, got {reason}"
        ) from problem
    try:
        server = _Server(port, poll)
    except OSError as problem:
        reason = problem.strerror
        raise EnvironmentProblem(f"{owner}: port {port} must be free, got {reason}") from problem
    address = f"http://{HOST}:{server.server_address[1]}/"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
    )
    try:
        thread.start()
        say(f"{owner}: open {address} ({poll.left()} votes to give); Ctrl-C ends it and counts")
        if ready is not None:
            ready(address)
        while poll.left() and not server.complete.wait(0.2):
            pass
        time.sleep(0.3)  # the last worker's thanks
    except KeyboardInterrupt:
        say(f"{owner}: stopped; answers are in {poll.path}")
    finally:
        if thread.is_alive():
            server.shutdown()
        server.server_close()
    return poll.left() == 0
