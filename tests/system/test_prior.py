"""The prior: stream, schedule, losses, causality, sizes, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import dalle_ext
from dalle.errors import CheckpointError, UsageError
from dalle.prior.blocks import gelu
from dalle.prior.config import PAD, layer_kinds
from dalle.prior.model import Prior
from dalle_ext.ops.sparse_attention import KINDS
from support.prior import make, sample


def test_schedule_is_the_papers():
    kinds = layer_kinds(64)
    assert kinds[:4] == ("row", "column", "row", "row")
    assert [i for i, kind in enumerate(kinds, 1) if kind == "column"] == list(range(2, 63, 4))
    assert kinds[-1] == "conv" and kinds.count("row") == 47
    assert layer_kinds(1) == ("conv",)


def test_gelu_is_the_sigmoid_form():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(gelu(x), x * torch.sigmoid(1.702 * x))


@pytest.mark.parametrize("kind", [*KINDS, ""])
def test_logits_never_see_what_comes_later(kind):
    model = make(attention=(kind,) * 3 if kind else ())
    text, image = sample(model)
    base = model(text, image)
    for i in range(text.shape[1]):
        changed = text.clone()
        changed[:, i] = (changed[:, i] + 1) % 11
        out = model(changed, image)
        assert torch.equal(out.text_logits[:, : i + 1], base.text_logits[:, : i + 1])
        assert not torch.allclose(out.image_logits[:, 0], base.image_logits[:, 0])
    for p in range(image.shape[1]):
        changed = image.clone()
        changed[:, p] = (changed[:, p] + 1) % 7
        out = model(text, changed)
        assert torch.equal(out.text_logits, base.text_logits)
        assert torch.equal(out.image_logits[:, : p + 1], base.image_logits[:, : p + 1])
        if p + 1 < image.shape[1]:  # the next slot carries this token
            assert not torch.allclose(out.image_logits[:, p + 1], base.image_logits[:, p + 1])


def test_stream_by_hand():
    model = make()
    text, image = sample(model)
    found = model.embed_text(text)
    pads, words = model.text_padding, model.text_embedding.weight
    torch.testing.assert_close(found[0, 0], model.start_of_text + model.text_position[0])
    torch.testing.assert_close(found[0, 2], words[text[0, 1]] + model.text_position[2])
    assert torch.equal(found[0, 3:], pads[3:])  # replaces token and position
    found = model.embed_image(image)
    place = model.image_row[1] + model.image_column[2]  # slot 6 of a grid 4 wide
    torch.testing.assert_close(found[1, 6], model.image_embedding.weight[image[1, 5]] + place)
    start = model.start_of_image + model.image_row[0] + model.image_column[0]
    torch.testing.assert_close(found[1, 0], start)


def test_forward_equals_a_plain_transformer():
    """The whole forward pass once more, with dense masks and one head at a time."""
    model = make()
    text, image = sample(model)
    c = model.config
    x = torch.cat([model.embed_text(text), model.embed_image(image)], 1)
    for layer, kind in zip(model.layers, layer_kinds(c.num_layers), strict=True):
        pattern = dalle_ext.AttentionPattern(
            kind, text_len=c.text_len, grid=c.grid, kernel_size=c.kernel_size
        )
        part = layer.attention
        width, size = c.d_model, c.d_model // c.num_heads
        packed = F.linear(part.norm(x), part.qkv.weight, part.qkv.bias)
        mixed = []
        for h in range(c.num_heads):
            q, k, v = (
                packed[..., i * width + h * size : i * width + (h + 1) * size] for i in range(3)
            )
            scores = (q @ k.mT / math.sqrt(size)).masked_fill(~pattern.mask(), -math.inf)
            mixed.append(scores.softmax(-1) @ v)
        x = x + part.out(torch.cat(mixed, -1))
        inner = layer.mlp.wide_in(layer.mlp.norm(x))
        x = x + layer.mlp.wide_out(inner * torch.sigmoid(1.702 * inner))
    x = model.norm(x)
    out = model(text, image)
    torch.testing.assert_close(out.text_logits, model.text_head(x[:, :4]), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out.image_logits, model.image_head(x[:, 5:]), atol=2e-5, rtol=1e-4)


def test_reference_attention_gives_the_same():
    model = make()
    text, image = sample(model)
    out = model(text, image)
    with dalle_ext.use_reference():
        other = model(text, image)
    torch.testing.assert_close(out.image_logits, other.image_logits, atol=2e-5, rtol=1e-4)


def test_losses_are_weighted_and_count_real_text():
    model = make()
    text, image = sample(model)
    out = model(text, image)
    chances = out.text_logits.log_softmax(-1)
    places = [(0, 0), (0, 1), *((1, i) for i in range(4))]
    wanted = -sum(chances[b, i, text[b, i]] for b, i in places) / len(places)
    torch.testing.assert_close(out.text_loss, wanted)
    chances = out.image_logits.log_softmax(-1).gather(-1, image[..., None])
    torch.testing.assert_close(out.image_loss, -chances.mean())
    torch.testing.assert_close(out.loss, out.text_loss / 8 + 7 * out.image_loss / 8)
    assert out.text_logits.dtype == out.image_logits.dtype == torch.float32


def test_text_loss_can_count_padding():
    model = make(text_targets="padded")
    text, image = sample(model)
    out = model(text, image)
    assert out.text_logits.shape == (2, 4, 12)
    target = torch.where(text == PAD, 11, text)
    wanted = F.cross_entropy(out.text_logits.flatten(0, 1), target.flatten())
    torch.testing.assert_close(out.text_loss, wanted)


def test_captions_of_padding_alone_have_no_text_loss():
    model = make()
    text, image = sample(model)
    with torch.no_grad():
        out = model(torch.full_like(text, PAD), image)
    assert float(out.text_loss) == 0 and math.isfinite(float(out.loss))


def test_checkpointing_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        model = make(checkpointing=recompute, dropout=0.1).train()
        torch.manual_seed(3)
        model(*sample(model)).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_every_parameter_gets_a_gradient():
    model = make().train()
    model(*sample(model)).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_bf16_is_near_fp32():
    model, half = make(), make(precision="bf16")
    half.load_state_dict(model.state_dict())
    text, image = sample(model)
    out, near = model(text, image), half(text, image)
    assert near.image_logits.dtype == torch.float32
    assert half.layers[0].mlp.wide_in.weight.dtype == torch.float32
    error = (out.image_logits - near.image_logits).abs().max().detach()
    assert 0 < float(error) < 0.05 * float(out.image_logits.detach().abs().max())


def test_dropped_tokens_leave_position_alone():
    model = make()
    _, image = sample(model)
    keep = torch.ones_like(image, dtype=torch.bool)
    assert torch.equal(model.embed_image(image, keep), model.embed_image(image))
    keep[:, 5] = False
    found = model.embed_image(image, keep)
    torch.testing.assert_close(found[1, 6], model.image_row[1] + model.image_column[2])


def test_init_is_that_of_the_paper():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Prior.from_preset("tiny")
    c = model.config
    assert not model.image_head.weight.any() and not model.text_head.weight.any()
    for weight, std in (
        (model.text_embedding.weight, 0.125 / math.sqrt(c.d_model)),
        (model.layers[0].attention.qkv.weight, 0.125 / math.sqrt(c.d_model)),
        (model.layers[0].mlp.wide_in.weight, 0.125 / math.sqrt(c.d_model)),
        (model.layers[0].mlp.wide_out.weight, 0.125 / math.sqrt(4 * c.d_model * 2 * c.num_layers)),
    ):
        assert float(weight.std()) == pytest.approx(std, rel=0.05)


def test_paper_sizes_on_the_meta_device():
    with torch.device("meta"):
        model = Prior.from_preset("12b")
    c = model.config
    assert (c.d_model, c.num_heads, c.num_layers, c.length) == (3968, 62, 64, 1280)
    assert (c.text_vocab, c.image_vocab) == (16384, 8192)
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if n[:6] == "layers" and p.ndim > 1
    )
    assert matrices == 12 * 3968**2 * 64
    heads = 2 * (16384 + 8192) * 3968 + 16384 + 8192
    tables = (2 + 2 * 256 + 2 * 32) * 3968
    vectors = 64 * (4 * 3968 + 9 * 3968) + 2 * 3968  # gains and biases
    total = sum(p.numel() for p in model.parameters())
    assert total == matrices + heads + tables + vectors


def test_one_billion_preset_is_near_its_name():
    with torch.device("meta"):
        total = sum(p.numel() for p in Prior.from_preset("1b").parameters())
    assert 0.95e9 < total < 1.2e9


def test_save_and_load(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    again = Prior.from_pretrained(tmp_path)
    assert again.config == model.config
    text, image = sample(model)
    assert torch.equal(model(text, image).image_logits, again(text, image).image_logits)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        Prior.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"d_model": 33}, "Prior: d_model must be a multiple of num_heads, got 33"),
        ({"kernel_size": 4}, "Prior: kernel_size must be odd and at least 1, got 4"),
        (
            {"precision": "fp8"},
            "Prior: precision must be one of fp32, bf16, fp16-sca",
        ),
        (
            {"half_weights": True},
            "Prior: half_weights must be False where precision is",
        ),
        ({"grid": (0, 4)}, "Prior: grid must be (rows, columns) of at least 1, got (0, 4)"),
        ({"attention": ("row",)}, "Prior: attention must be empty or one pattern for each layer"),
        ({"attention": ("row", "row", "ring")}, "Prior: attention must be made of row, column"),
    ],
)
def test_bad_config(overrides, line):
    with pytest.raises(UsageError) as error:
        make(**overrides)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_unknown_preset():
    with pytest.raises(UsageError, match=r"preset must be one of tiny, .*got 'smal' \(did you"):
        Prior.from_preset("smal")


def test_bad_input():
    model = make()
    text, image = sample(model)
    for bad, line in [
        ((text[:, 1:], image), r"text must be \(B, 4\) int64, got \(2, 3\)"),
        ((text.int(), image), r"text must be .* got .* torch.int32"),
        ((text, image[:, 1:]), r"image_tokens must be \(2, 12\) int64 .*got \(2, 11\)"),
        ((text, image[:1]), r"image_tokens must be \(2, 12\)"),
        ((text + 9, image), r"text must lie in -1 .. 10, got"),
        ((text, image - 7), r"image_tokens must lie in 0 .. 6, got -7"),
    ]:
        with pytest.raises(UsageError, match=line):
            model(*bad)
