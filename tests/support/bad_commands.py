"""What `dalle prior train` says on each of two processes to options that do not fit."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr

import torch.distributed as dist

from dalle.cli import main
from dalle.data.sources import BUILT_IN
from support.jobs import arguments

# A list is what each process gets; NAME=VALUE is set in the environment; "dvae" begins a command.
BAD = {
    "cluster: machines must divide the 2 processes, got 3": ["--machines", "3"],
    "cluster: timeout must be positive, got 0.0": ["--timeout", "0"],
    "cluster: batch_size must be at least the 2 processes, got 1": ["--batch-size", "1"],
    "prior train: half_weights must be off on many processes, where a gathered block has one "
    "dtype, got True": ["--precision", "fp16-scaled", "--half-weights"],
    "PowerSGD: rank must leave a matrix that factors make smaller, got 5000: nothing would be "
    "compressed": ["--machines", "2", "--powersgd-rank", "5000"],
    "cluster: cluster.powersgd_rank must be the same on all processes (2 on process 0), got 3 on": [
        "--machines", "2", "--powersgd-rank", ["2", "3"]],
    "cluster: picture_every must be the same on all processes (5 on process 0), got 6 on": [
        "--picture-every", ["5", "6"]],
    "dvae train: powersgd_rank must be 0, got 2": [
        "dvae", "train", "--data", "{given}/pairs", "--out", "{out}", "--preset", "tiny",
        "--batch-size", "4", "--steps", "1", "--machines", "2", "--powersgd-rank", "2",
        "--recipe", "paper"],
    f"data: spec must be one of {', '.join(BUILT_IN)} or a folder, got 'nowhere' (no such folder) "
    "(on process 1)": ["--data", ["{given}/pairs", "nowhere"]],
    "nowhere/config.json: must be a readable file, got: No such file or directory (on process 1)": [
        "--vae", ["{given}/vae", "nowhere"]],
    "prior train: out must be a folder that can be written, got {given}/pairs/0.png: it is a": [
        "--out", "{given}/pairs/0.png"],
    "prior: {given}/blocked/metrics.jsonl must be writable, got it is a folder, ": [
        "--out", "{given}/blocked"],
    "prior train: {given}/occupied/model/config.json must be writable, got its folder is": [
        "--out", "{given}/occupied", "--steps", "0"],
    "cluster: processes of a machine must be as many on each, or machines given, got "
    "LOCAL_WORLD_SIZE 1, 2 of 2": [["LOCAL_WORLD_SIZE=1", "LOCAL_WORLD_SIZE=2"]],
    "cluster: processes must reach each other, got on process": [
        # Whoever comes first may have given up, and taken the store along, before the other comes.
        "GLOO_SOCKET_IFNAME=nowhere0", "--timeout", "20",
    ],
}  # fmt: skip


def commands(rank, given, out, ports):
    """What `dalle prior train` says on this process to each of `BAD`."""
    said = []
    for port, options in zip(ports, BAD.values(), strict=True):
        os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
        words = [word if isinstance(word, str) else word[rank] for word in options]
        words = [word.format(given=given, out=out) for word in words]
        os.environ |= dict(word.split("=") for word in words if "=" in word)
        words = [word for word in words if "=" not in word]
        if words[:1] != ["dvae"]:
            words = arguments(given, out) + words
        with redirect_stderr(io.StringIO()) as lines:
            code = main(words)
        said.append([code, lines.getvalue()])
        if dist.is_initialized():
            dist.destroy_process_group()
    return said
