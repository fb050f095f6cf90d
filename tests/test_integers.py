"""Integers of any kind are accepted wherever an integer is, and mean the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dalle_ext
from dalle import pictures, plan
from dalle.configs import to_dict
from dalle.data import augment
from dalle.data.pairs import ArrayPairs, BatchSampler, load_or_draw, load_or_skip
from dalle.data.shapes import ShapesConfig, zero_pairs
from dalle.data.shapes_pairs import ShapesPairs
from dalle.distributed import PowerSGD
from dalle.dvae.codebook import kmeans
from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.errors import DataError, UsageError
from dalle.plan import cluster_plan
from dalle.precision import ResblockScaler
from dalle.prior.config import PriorConfig
from dalle.prior.model import Prior
from dalle.prior.sampling import SamplingConfig
from dalle.ranker.model import ContrastiveRanker, _check_pairs
from dalle.tokenizer import Tokenizer
from dalle.train import schedules
from dalle.train.averaging import IterateAverage
from dalle.train.checkpoint import save_checkpoint
from dalle.train.config import LoopConfig
from dalle.train.dvae import DvaeTrainConfig
from dalle.train.parts import slices
from dalle.train.prior_recipe import PriorTrainConfig
from dalle.train.ranker import RankerTask, RankerTrainConfig
from dalle.train.seeds import step_seed
from dalle.train.splicing import patches

X = torch.linspace(-1, 1, 800).sin().view(100, 8)
IMAGE = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
SMALL = {"stem": "patch", "n_hid": 8, "n_blk_per_group": 1, "n_init": 8, "vocab_size": 16}
RATES = {"tflops": 100.0, "link_gbit": 100.0, "peer_gbyte": 100.0}


def prior_of(k):
    sizes = {"text_vocab": k(20), "image_vocab": k(16), "text_len": k(4), "grid": (k(2), k(3))}
    return PriorConfig(d_model=k(32), num_heads=k(2), num_layers=k(2), kernel_size=k(3), **sizes)


def drawn(k):
    torch.manual_seed(0)
    prior, text = Prior(prior_of(int)), torch.zeros(1, 3, dtype=torch.int64)
    numbers = {"num_samples": k(2), "top_k": k(5), "seed": k(3), "first_sample": k(1)}
    return prior.generate(text, max_batch=k(4), **numbers)


def plateau(k):
    halving = schedules.PlateauHalving(window=k(2), patience=k(1), max_halvings=k(2))
    return [halving.update(1.0) for _ in range(8)]


def average(k):
    found = IterateAverage(torch.nn.Linear(2, 2), 0.9, k(2))
    for step in range(4):
        found.update(k(step))
    return found.copies


def steps_of(k):
    param = torch.nn.Parameter(torch.ones(9000))
    param.grad = torch.ones(9000)
    optimizer = dalle_ext.AdamW16([param], seed=k(5))
    optimizer.step()
    return [param.detach(), *optimizer.state[param].values()]


def pattern(k):
    made = dalle_ext.AttentionPattern(
        "conv", text_len=k(4), grid=(k(5), k(6)), kernel_size=k(3), offsets=[k(0), k(2)]
    )
    return repr(made), made.flops(k(100), k(100), k(64)), made.bytes(k(100), k(100), k(64), k(2))


SCALES, GRADS = torch.tensor([2.0, 4.0]), [torch.ones(3), torch.ones(4)]
CALLS = {
    "AdamW16": steps_of,
    "AttentionPattern": pattern,
    "area_resize": lambda k: dalle_ext.area_resize(IMAGE, k(16), k(9)),
    "gumbel_softmax": lambda k: dalle_ext.gumbel_softmax(
        X, 0.5, dim=k(1), seed=k(3), first_row=k(2)
    ),
    "pack": lambda k: dalle_ext.pack(X, "1-6-9", rounding="stochastic", seed=k(5)),
    "unscale_gradients_": lambda k: dalle_ext.unscale_gradients_(
        [g.clone() for g in GRADS], SCALES, [k(0), k(1)]
    ),
    "BatchSampler": lambda k: BatchSampler(k(100), k(48), k(3)).indices(k(9)),
    "DiscreteVAE.grid": lambda k: DiscreteVAE(DiscreteVAEConfig(**SMALL)).grid(k(24)),
    "IterateAverage": average,
    "PlateauHalving": plateau,
    "PowerSGD": lambda k: (lambda made: (made.rank, made.seed))(
        PowerSGD(rank=k(4), seed=k(3)).compressor
    ),
    "Prior.generate": drawn,
    "ResblockScaler": lambda k: (
        ResblockScaler(
            {"a": torch.nn.Linear(2, 2)}, replicas=k(2), window=k(100), sample_every=k(7)
        ).scales
    ),
    "ShapesPairs": lambda k: ShapesPairs(image_size=k(24), seed=k(3), size=k(3)).images,
    "Tokenizer": lambda k: Tokenizer.train(["a red square"], vocab_size=260).encode(
        ["a red", "b"], k(5), dropout=0.5, seed=k(3)
    ),
    "center_crop": lambda k: augment.center_crop(IMAGE, k(16)),
    "cluster_plan": lambda k: json.dumps(
        cluster_plan(PriorConfig(), gpus=k(64), per_machine=k(8), batch=k(8), rank=None, **RATES)
    ),
    "cosine_ramp": lambda k: schedules.cosine_ramp(k(99), 1.0, 0.0, k(125)),
    "dvae_crop": lambda k: augment.dvae_crop(IMAGE, k(16), np.random.default_rng(0)),
    "kmeans": lambda k: kmeans(X, k(4), iterations=k(2), seed=k(3)),
    "linear_warmup": lambda k: schedules.linear_warmup(k(99), 1.0, k(127)),
    "make_plan": lambda k: json.dumps(plan.make_plan("paper", PriorConfig(), k(8))),
    "pictures.grid": lambda k: np.asarray(
        pictures.grid(torch.zeros(3, 3, 8, 8), columns=k(2), scale=k(2))
    ),
    "prior_crop": lambda k: augment.prior_crop(IMAGE, k(16), np.random.default_rng(0)),
    "step_seed": lambda k: step_seed(k(100), k(101), k(2), k(3)),
    "config of a dVAE": lambda k: json.dumps(
        to_dict(DiscreteVAEConfig(**{**SMALL, "n_hid": k(8)}))
    ),
    "config of a prior": lambda k: json.dumps(to_dict(prior_of(k))),
    "config of shapes": lambda k: json.dumps(to_dict(ShapesConfig(num_zero_pairs=k(3)))),
}


def test_a_scale_of_any_kind_of_number_is_a_float():
    assert type(SamplingConfig(cond_scale=10**30).cond_scale) is float  # torch refused it
    assert SamplingConfig(top_p=np.float32(0.5), temperature=torch.tensor(2.0)) == SamplingConfig(
        top_p=0.5, temperature=2.0
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, (tuple, list)):
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and one == other


@pytest.mark.filterwarnings("error:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", CALLS)
def test_kinds_of_integers_mean_the_same(name):
    """uint8 and int16 used to overflow in products of sizes, and torch's generators to refuse."""
    wanted = CALLS[name](int)
    for kind in (np.int64, np.int16, np.uint8, torch.tensor):
        assert same(wanted, CALLS[name](kind)), kind


@pytest.mark.parametrize(
    "value",
    [1.5, np.float64(2.0), "2", None, True, np.bool_(True), torch.ones(2, 2), np.ones((3, 3))],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_integer_gets_one_line(value):
    calls = {
        "AttentionPattern: text_len": lambda: dalle_ext.AttentionPattern(
            "row", text_len=value, grid=(2, 2)
        ),
        "area_resize: height": lambda: dalle_ext.area_resize(IMAGE, value, 4),
        "gumbel_softmax: dim": lambda: dalle_ext.gumbel_softmax(X, 1.0, dim=value),
        "kmeans: num_centers": lambda: kmeans(X, value, iterations=1, seed=0),
        "tokenizer: length": lambda: Tokenizer.train(["a"], 260).encode(["a"], value),
        "center_crop: size": lambda: augment.center_crop(IMAGE, value),
        "train: steps": lambda: LoopConfig(steps=value, out=Path("x")),
    }
    for argument, call in calls.items():
        with pytest.raises((ValueError, UsageError), match=f"^{argument} must be .*, got ") as line:
            call()
        assert "\n" not in str(line.value)


def ranker_task(seed):
    pairs = ShapesPairs(size=4)
    tokenizer = Tokenizer.train(pairs.captions, 260)
    ranker = ContrastiveRanker.from_preset("tiny", tokenizer=tokenizer, image_size=24, width=32)
    return RankerTask(ranker, pairs, RankerTrainConfig(batch_size=4), steps=2, seed=seed)


SEEDS = {
    "BatchSampler": lambda seed: BatchSampler(4, 2, seed),
    "step_seed": lambda seed: step_seed(seed, 0),
    "shapes": lambda seed: ShapesPairs(size=1, seed=seed),
    "kmeans": lambda seed: kmeans(X, 2, iterations=1, seed=seed),
    "ranker": ranker_task,
}


@pytest.mark.parametrize("owner", SEEDS)
@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1"])
def test_a_seed_has_63_bits(owner, seed):
    with pytest.raises(UsageError, match=f"^{owner}: seed must be .*, got "):
        SEEDS[owner](seed)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("step_seed: step", lambda: step_seed(0, -1)),
        ("step_seed: stream", lambda: step_seed(0, 0, -1)),
        ("step_seed: index", lambda: step_seed(0, 0, 1, -1)),
        ("BatchSampler: step", lambda: BatchSampler(4, 2, 0).indices(-1)),
        ("kmeans: num_centers", lambda: kmeans(X, 0, iterations=1, seed=0)),
        ("kmeans: iterations", lambda: kmeans(X, 1, iterations=-1, seed=0)),
        ("parts: parts", lambda: slices(4, 0)),
        ("patches: grid", lambda: patches(torch.zeros(1, 3, 8, 8), 0)),
        ("shapes: num_pairs", lambda: zero_pairs(-1)),
        ("shapes .*: indices", lambda: load_or_skip(ShapesPairs(size=2), [0.5])),
        ("shapes .*: indices", lambda: load_or_draw(ShapesPairs(size=2), "0", int, None)),
        ("shapes .*: limit", lambda: load_or_skip(ShapesPairs(size=2), [0], limit=-1)),
        ("shapes: split", lambda: ShapesPairs(["train"])),
        ("IterateAverage: decay", lambda: IterateAverage(torch.nn.Linear(1, 1), "0.9")),
        ("PlateauHalving: min_delta", lambda: schedules.PlateauHalving(min_delta="0")),
        ("ranker: learning_rate", lambda: RankerTrainConfig(learning_rate=None)),
        ("dvae train: beta1", lambda: DvaeTrainConfig(beta1="0.9")),
        ("prior train: eps", lambda: PriorTrainConfig(eps=None)),
        ("generate: cond_scale", lambda: SamplingConfig(cond_scale=10**400)),
        ("generate: temperature", lambda: SamplingConfig(temperature="1")),
        ("ranker: clip_norm", lambda: RankerTrainConfig(clip_norm=10**400)),
        ("ranker: captions", lambda: _check_pairs("x", torch.zeros(1, 3, 8, 8))),
        ("ranker: images", lambda: _check_pairs(["x"], [1])),
        ("checkpoint: keep", lambda: save_checkpoint(None, Path("x"), 1, keep=0)),
    ],
)
def test_counts_and_numbers_beyond_reason_get_one_line(argument, call):
    with pytest.raises(UsageError, match=f"^{argument} must be .*, got "):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: ArrayPairs("set", [IMAGE], ["a"]),
        lambda: ArrayPairs("set", np.zeros((1, 2, 2, 3), np.uint8), "a"),
        lambda: ArrayPairs("set", np.zeros((1, 2, 2, 3), np.uint8), [5]),
        lambda: augment.to_tensor([[1, 2]]),
        lambda: augment.to_tensor(5),
        lambda: augment.center_crop([[1, 2]], 2),
    ],
)
def test_lists_of_something_else_are_data_errors(call):
    with pytest.raises(DataError, match=r"^\w+: (images|image|captions) must be .*, got "):
        call()
