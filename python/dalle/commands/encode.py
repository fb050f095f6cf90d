"""`dalle data encode`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from dalle.commands import presets
from dalle.commands.report import next_of_codes, train_on_codes
from dalle.config_files import CONFIG_NAME
from dalle.configs import integer
from dalle.console import is_main_process, printable, say
from dalle.data.augment import center_crop, prior_crop, to_tensor
from dalle.data.codes import (
    FORMAT_VERSION,
    HEAD_FILE,
    MAX_CODES,
    ShardRecord,
    check_size,
    records_of,
    require_pictures,
    shard_bytes,
)
from dalle.data.mixture import say_weights_stay_behind
from dalle.data.pairs import Pairs, captions_of, describe_pairs, format_counts, leave_out
from dalle.data.sources import absolute, check_apart, has_built_in
from dalle.data.split import hold_hashes
from dalle.devices import pick_device
from dalle.distributed.config import ClusterConfig
from dalle.distributed.world import World, join
from dalle.dvae.model import DiscreteVAE
from dalle.dvae.picture_size import side_for
from dalle.errors import DataError, UsageError, stopped_with
from dalle.files import (
    make_folder,
    read_object,
    real_path,
    remove_temporary,
    saving,
    sha256,
    to_json,
    write_atomic,
)
from dalle.pretrained import fingerprint
from dalle.train.seeds import step_seed

OWNER = "data encode"
PREFIX, SUFFIX = "codes-", ".safetensors"


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Writes the image tokens of a set with its captions; `dalle prior train --data OUT` reads them
    in place of pictures. The same command goes on where it was stopped; torchrun shares the work.

    Attributes:
        data: shapes, emoji, a folder of pictures with captions, of tar shards, or a table.
        vae: model folder of `dalle dvae train`.
        out: folder for the codes.
        image_size: side in pixels of the crops; 0 takes that of the dVAE's training; where it is
            not known, 256, and a line says so.
        augment: none takes the centre of each picture; paper draws crops as listing 2 does.
        crops: how many crops of each picture, with paper.
        shard_size: pictures a file.
        batch_size: pictures that are encoded at a time.
        seed: of the crops.
        device: cpu, cuda or auto.
    """

    data: str
    vae: Path
    out: Path
    image_size: int = 0
    augment: Literal["none", "paper"] = "none"
    crops: int = 1
    shard_size: int = 8192
    batch_size: int = 128
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        integer(OWNER, "crops", self.crops, 1)
        if self.crops > 1 and self.augment == "none":
            raise UsageError(f"{OWNER}: crops must be 1 without --augment paper, got {self.crops}")
        for name in ("shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{OWNER}: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("image_size", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{OWNER}: {name} must be 0 or more, got {getattr(self, name)}")


def encode(config: EncodeConfig) -> None:
    """Encodes what is missing, then writes codes.json."""
    device = pick_device(config.device)
    kept = f"whole shards are kept in {config.out}, and the same command goes on"
    stopped = stopped_with(f"{OWNER}: stopped by the keyboard; {kept}")
    with stopped, join(ClusterConfig(), device) as world:
        with world.raise_on_all():
            vae = DiscreteVAE.from_pretrained(config.vae).to(world.device)
            size = side_for(OWNER, vae, config.vae, asked=config.image_size)
            drawn = size if has_built_in(config.data) else 0
            pairs = presets.open_pairs(config.data, drawn, size, 0)
            require_pictures(OWNER, pairs)
            check_apart(OWNER, config.data, config.out)
            say_weights_stay_behind(OWNER, pairs)
            head = _head(config, vae, pairs, size)
            make_folder(config.out, OWNER)
            done = is_main_process() and _is_done(config.out, head)
        if world.first(done):
            if is_main_process():
                print(f"{OWNER}: {config.out} is encoded already")
            return
        with world.raise_on_all():
            if is_main_process():
                with saving(OWNER, config.out / HEAD_FILE):
                    remove_temporary(config.out)
                    write_atomic(config.out / HEAD_FILE, to_json(head))
        world.barrier()
        _encode_shards(config, vae, pairs, size, world)
        world.barrier()  # the records of all processes are there
        if is_main_process():
            _finish(config, head, len(pairs))


def _head(config: EncodeConfig, vae: DiscreteVAE, pairs: Pairs, size: int) -> dict[str, Any]:
    """codes.json before the first shard: what the codes are made of and how."""
    if vae.num_tokens > MAX_CODES:
        raise UsageError(f"{OWNER}: codes must be at most {MAX_CODES:,}, got {vae.num_tokens:,}")
    return {
        "format_version": FORMAT_VERSION,
        "vae": fingerprint(vae),
        "num_codes": vae.num_tokens,
        "grid": list(vae.grid(size)),
        "image_size": size,
        "augment": config.augment,
        "crops": config.crops,
        "seed": config.seed,
        "shard_size": config.shard_size,
        "data": describe_pairs(pairs),
        "made_from": {"data": absolute(config.data), "vae": str(real_path(config.vae))},
        "finished": False,
        "shards": [],
    }


def _is_done(out: Path, head: dict[str, Any]) -> bool:
    """Whether OUT holds all these codes, each shard with its checksum. Where one of a finished
    store is not, the others get their records back, so that they are kept.

    Raises:
        UsageError: it holds codes of other data or options, or something else.
    """
    if not (out / HEAD_FILE).exists():
        others = [name for name in os.listdir(out) if name != CONFIG_NAME and name[0] != "."]
        if others:
            raise UsageError(f"{OWNER}: out must be a new or empty folder, got {others[0]} in it")
        return False
    there = read_object(out / HEAD_FILE, DataError)
    for key in head.keys() - {"finished", "shards", "made_from"}:
        if there.get(key) != head[key]:
            raise UsageError(
                f"{OWNER}: out must hold codes of this data and these options, got another {key}; "
                "take another folder"
            )
    if not there.get("finished"):
        return False
    records = records_of(there, out)
    whole = {
        number: record
        for number, record in enumerate(records)
        if record.name == _name(number) and _is_whole(out, record)
    }
    if len(whole) == len(records):
        return True
    say(f"{OWNER}: {len(records) - len(whole)} of {len(records)} shards are made anew")
    for number, record in whole.items():
        with saving(OWNER, _record_path(out, number)):
            write_atomic(_record_path(out, number), to_json(asdict(record)))
    return False


def _is_whole(out: Path, record: ShardRecord) -> bool:
    """Whether a shard is there with its checksum."""
    with suppress(DataError, OSError):
        check_size(out / record.name, record)
        return sha256(out / record.name) == record.sha256
    return False


def _name(number: int) -> str:
    return f"{PREFIX}{number:06d}{SUFFIX}"


def _record_path(out: Path, number: int) -> Path:
    return out / f"{PREFIX}{number:06d}.json"


def _record(out: Path, number: int) -> ShardRecord | None:
    """The record of a shard that is there, whole; None for one that is to be made."""
    with suppress(DataError, OSError):
        (record,) = records_of({"shards": [read_object(_record_path(out, number), DataError)]}, out)
        return record if _is_whole(out, record) else None
    return None


def _encode_shards(
    config: EncodeConfig, vae: DiscreteVAE, pairs: Pairs, size: int, world: World
) -> None:
    """Writes this process's shards that are not there yet, each with its record."""
    numbers = range(world.rank, -(-len(pairs) // config.shard_size), world.size)
    missing = [number for number in numbers if _record(config.out, number) is None]
    if not missing:
        return
    hashes = np.concatenate([*hold_hashes(pairs)])
    items_of = [
        range(n * config.shard_size, min(len(pairs), (n + 1) * config.shard_size)) for n in missing
    ]
    total = sum(len(items) for items in items_of)
    with tqdm(total=total, desc=OWNER, unit=" pictures", disable=not is_main_process()) as bar:
        for number, items in zip(missing, items_of, strict=True):
            codes, kept, skipped = _encode_items(config, vae, pairs, size, items, bar)
            captions = [captions_of(pairs, i) for i in kept]
            data, texts, several = shard_bytes(codes, captions, hashes[kept])
            name = _name(number)
            with saving(OWNER, config.out / name):
                write_atomic(config.out / name, data)
                record = ShardRecord(
                    name=name,
                    items=len(kept),
                    captions=texts,
                    several=several,
                    bytes=len(data),
                    sha256=sha256(config.out / name),
                    skipped=dict(skipped),
                )
                write_atomic(_record_path(config.out, number), to_json(asdict(record)))


def _batches(items: Sequence[int], count: int) -> Iterator[list[int]]:
    """Runs of nearly equal length of at most `count`, as `PriorTask` encodes a set."""
    parts = np.array_split(np.arange(items[0], items[-1] + 1), -(-len(items) // count))
    return (part.tolist() for part in parts)


@torch.no_grad()
def _encode_items(
    config: EncodeConfig,
    vae: DiscreteVAE,
    pairs: Pairs,
    size: int,
    items: Sequence[int],
    bar: tqdm[Any],
) -> tuple[np.ndarray, list[int], Counter[str]]:
    """Codes (n, crops, N) of the pictures that can be used, their items, and why others cannot."""
    codes, kept, skipped = [], [], Counter[str]()
    for batch in _batches(items, config.batch_size):
        crops: list[np.ndarray] = []
        for item in batch:
            try:
                image = pairs.load(item)
                made = [_crop(config, image, size, item, crop) for crop in range(config.crops)]
            except DataError as problem:
                skipped[getattr(problem, "reason", "does not decode")] += 1
                leave_out(pairs, item, problem)
                continue
            kept.append(item)
            crops += made
        for begin in range(0, len(crops), config.batch_size):
            images = to_tensor(crops[begin : begin + config.batch_size])
            codes.append(vae.encode(images.to(next(vae.parameters()).device)).flatten(1).cpu())
        bar.update(len(batch))
    shape = (len(kept), config.crops, vae.grid(size)[0] * vae.grid(size)[1])
    found = torch.cat(codes).numpy() if codes else np.empty(0, np.int64)
    return found.reshape(shape), kept, skipped


def _crop(config: EncodeConfig, image: np.ndarray, size: int, item: int, crop: int) -> np.ndarray:
    if config.augment == "none":
        return center_crop(image, size)
    return prior_crop(image, size, np.random.default_rng(step_seed(config.seed, item, 8, crop)))


def _finish(config: EncodeConfig, head: dict[str, Any], total: int) -> None:
    """Writes codes.json with the records of all shards, and says what there is."""
    count = -(-total // config.shard_size)
    records = [record for n in range(count) if (record := _record(config.out, n)) is not None]
    if len(records) < count:
        raise DataError(f"{OWNER}: shards must be {count}, got {len(records)}; run it once more")
    finished = {"finished": True, "shards": [asdict(record) for record in records]}
    with saving(OWNER, config.out / HEAD_FILE):
        write_atomic(config.out / HEAD_FILE, to_json({**head, **finished}))
        remove_temporary(config.out)
    for number in range(count):
        _record_path(config.out, number).unlink(missing_ok=True)
    items, size = sum(r.items for r in records), sum(r.bytes for r in records)
    skipped: Counter[str] = Counter()
    for record in records:
        skipped.update(record.skipped)
    why = f"; left out {skipped.total()}: {format_counts(skipped)}" if skipped else ""
    shards = "1 shard" if count == 1 else f"{count} shards"
    print(f"{OWNER}: {items:,} pictures in {shards}, {size:,} bytes, in {config.out}{why}")
    if not items:
        raise DataError(f"{OWNER}: {config.data} must hold a picture that can be used, got none")
    if head["image_size"] % 2 == 0:  # the ranker's pictures have an even side
        line = train_on_codes(config.out, config.vae)
        print(printable(f"{OWNER}: all that follows in one command: {line}"))
    print(printable(f"{OWNER}: next: {next_of_codes(config.out, config.vae)}"))
