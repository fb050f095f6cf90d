"""`dalle plan`: parameters, FLOPs, memory, traffic against modules and the paper's tables."""

from __future__ import annotations

import json

import pytest
import torch

from dalle.cli import main
from dalle.errors import UsageError
from dalle.plan import (
    compression,
    factor_elements,
    flops,
    make_plan,
    memory,
    memory_of_gpu,
    parameters,
    shards,
    traffic,
)
from dalle.prior.config import PRESETS, PriorConfig
from dalle.prior.model import Prior


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_module(preset):
    with torch.device("meta"):
        model = Prior(PRESETS[preset])
    counted = parameters(PRESETS[preset])
    assert counted["total"] == sum(p.numel() for p in model.parameters())
    layers = sum(p.numel() for p in model.layers.parameters())
    final = sum(p.numel() for p in model.norm.parameters())
    assert counted["attention"] + counted["mlp"] + counted["norms"] == layers + final
    heads = [*model.text_head.parameters(), *model.image_head.parameters()]
    assert counted["unembeddings"] == sum(p.numel() for p in heads)


def test_padded_targets_are_one_more_class():
    config = PriorConfig(d_model=32, num_heads=2, num_layers=2, text_targets="padded")
    with torch.device("meta"):
        model = Prior(config)
    assert parameters(config)["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("width", "heads", "billions"), [(1920, 30, 2.83), (2688, 42, 5.55), (3968, 62, 12.09)]
)
def test_effective_counts_of_the_paper(width, heads, billions):
    config = PriorConfig(d_model=width, num_heads=heads, num_layers=64)
    assert round(parameters(config)["effective"] / 1e9, 2) == billions


def test_the_paper_model():
    plan = make_plan("12b", PRESETS["12b"], 1)
    assert (plan["d_model"], plan["num_heads"], plan["num_layers"]) == (3968, 62, 64)
    assert plan["positions"] == 1280
    assert plan["layers"] == {"row": 47, "column": 16, "conv": 1}
    # a 16-bit copy of the weights is about 24 GB, as the paper says
    assert memory(PRESETS["12b"], 1, "paper")["weights"] == pytest.approx(24.6e9, rel=0.01)


def test_flops_count_what_a_small_step_does():
    """torch's own counter sees the matrices; attention is counted from its mask."""
    from torch.utils.flop_counter import FlopCounterMode

    from dalle_ext import use_reference

    config = PriorConfig(
        text_vocab=50, image_vocab=30, text_len=6, grid=(4, 4), d_model=32, num_heads=2,
        num_layers=3, kernel_size=3,
    )  # fmt: skip
    model, batch = Prior(config), 2
    text = torch.randint(0, 50, (batch, 5))
    image = torch.randint(0, 30, (batch, 16))
    with use_reference(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(text, image)
    counts = flops(config, batch)
    dense = 4 * config.d_model * config.length**2 * config.num_layers * batch
    measured = counter.get_total_flops()
    assert measured - dense == counts["forward_matrices"] + counts["forward_logits"]
    pairs = sum(int(pattern.mask().sum()) for pattern in config.patterns())
    assert counts["forward_attention"] == 4 * config.d_model * pairs * batch
    forward = sum(counts[f"forward_{part}"] for part in ("matrices", "attention", "logits"))
    assert counts["step"] == 3 * forward
    assert counts["per_token"] == pytest.approx(3 * forward / batch / config.length)


def test_per_token_is_about_six_n():
    counts, count = flops(PRESETS["12b"], 1), parameters(PRESETS["12b"])
    assert counts["per_token"] / (6 * count["effective"]) == pytest.approx(1, abs=0.05)


def test_kept_activations_cover_what_autograd_keeps():
    """The estimate lies near the bytes that autograd saves in a real forward pass."""
    from dalle_ext import use_reference

    config = PriorConfig(
        text_vocab=64, image_vocab=64, text_len=16, grid=(8, 8), d_model=256, num_heads=4,
        num_layers=4, kernel_size=3,
    )  # fmt: skip
    model, kept = Prior(config), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    text, image = torch.zeros(4, 15, dtype=torch.long), torch.zeros(4, 64, dtype=torch.long)
    with use_reference(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(text, image).loss
    assert loss.requires_grad
    estimate = memory(config, 4, "fp32")["activations"]
    # the reference keeps the score matrices too, and the nonlinearity its factors
    scores = 2 * 4 * config.num_layers * 4 * config.num_heads * config.length**2
    assert 0.7 * estimate < sum(kept.values()) < 1.5 * estimate + scores


def test_memory_adds_up_and_grows_with_the_batch():
    for precision in ("fp32", "bf16", "paper"):
        parts = memory(PRESETS["base"], 2, precision)
        fixed = sum(parts[p] for p in ("weights", "gradients", "moments", "average", "logits"))
        assert parts["total"] == fixed + parts["activations"]
        assert parts["activations_checkpointed"] < parts["activations"]
        one = memory(PRESETS["base"], 1, precision)
        assert parts["activations"] == 2 * one["activations"] and parts["weights"] == one["weights"]


def test_command(capsys):
    assert main(["plan", "--preset", "12b", "--batch", "2", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == parameters(PRESETS["12b"]) and plan["batch"] == 2
    assert main(["plan"]) == 0
    out = capsys.readouterr().out
    assert all(f"prior {name}:" in out for name in PRESETS)
    assert main(["plan", "--preset", "12bb"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "got 12bb (did you mean 12b?)" in error
    assert main(["plan", "--batch", "0"]) == 2
    with pytest.raises(UsageError, match="batch must be 1 or more, got 0"):
        make_plan("base", PRESETS["base"], 0)


@pytest.mark.parametrize(
    ("width", "rank", "percent"), [(1920, 512, 83), (2688, 640, 85), (3968, 896, 86)]
)
def test_table_1_of_the_paper(width, rank, percent):
    assert compression(width, 8, rank) == pytest.approx(1 - 5 * rank / (8 * width), rel=1e-12)
    assert round(100 * compression(width, 8, rank)) == percent


def test_table_2_of_the_paper():
    """P: (5drm + 4dr) / m^2, Q: (drm + 8dr) / m^2, shards: 12 d^2 / m."""
    d, r, m = 3968, 896, 8
    p, q = factor_elements(d, m, r)
    assert p == (5 * d * r * m + 4 * d * r) // m**2
    assert q == (d * r * m + 8 * d * r) // m**2
    assert sum(a * b for a, b in shards(d, m)) == 12 * d * d // m
    assert shards(d, m)[0] == (3968, 496) and shards(d, m)[4:] == [(3968, 1984), (1984, 3968)]


def test_shards_are_those_of_the_module():
    """The layers' matrices of the 12b model, over 8 GPUs."""
    with torch.device("meta"):
        layer = Prior(PRESETS["12b"]).layers[0]
    matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert 8 * sum(a * b for a, b in shards(3968, 8)) == matrices


def test_one_machine_sends_nothing_and_compression_sends_its_share():
    shape = PRESETS["12b"]
    alone, many = traffic(shape, 1, 8, 896), traffic(shape, 128, 8, 896)
    assert alone["factors"] == alone["rest"] == alone["uncompressed"] == 0
    assert alone["gather"] == many["gather"] > 0
    matrices = many["uncompressed"] - many["rest"]
    assert many["factors"] / matrices == pytest.approx(1 - compression(3968, 8, 896))
    kept = memory_of_gpu(shape, 1, 8, compressed=True)
    assert kept["error_buffers"] == 12 * 3968**2 * 64 / 8 * 2
    assert kept["total"] == sum(v for k, v in kept.items() if k != "total")


def test_plan_of_a_cluster_prints(capsys):
    assert main(["plan", "--preset", "12b", "--gpus", "1024"]) == 0
    text = capsys.readouterr().out
    assert "rank 896 (112 a GPU): compression 85.9%" in text
    assert "width 1920 rank 512 83%, width 2688 rank 640 85%, width 3968 rank 896 86%" in text
    assert main(["plan", "--preset", "12b", "--gpus", "1024", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[0]["cluster"]
    assert list(found["machines"]) == ["1", "8", "64", "128"]
    seconds = found["machines"]["128"]["seconds"]
    assert seconds["compute"] <= seconds["step"] < seconds["step_uncompressed"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--gpus 12", "plan: gpus must be a multiple of 8 a machine, got 12"),
        ("--gpus 0", "plan: gpus must be above 0 and finite, got 0"),
        ("--gpus 8 --rank 100", "plan: rank must be a multiple of 8 from 8 to 3968, got 100"),
        (
            "--gpus 14 --per-machine 7",
            "plan: per_machine must be a divisor of the width 3968, got 7",
        ),
        ("--gpus 8 --link-gbit -1", "plan: link_gbit must be above 0 and finite, got -1.0"),
    ],
)
def test_bad_clusters_get_one_line(options, line, capsys):
    assert main(["plan", "--preset", "12b", *options.split()]) == 2
    assert line in capsys.readouterr().err
