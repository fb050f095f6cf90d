"""The discrete VAE: released names and shapes, the bound of the paper, saving, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import dalle_ext
from dalle.dvae.blocks import DECODER_KERNELS, ENCODER_KERNELS, Block, Conv2d
from dalle.dvae.likelihood import expected_pixels, logit_laplace_log_prob, map_pixels
from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.errors import CheckpointError, UsageError

SMALL = {"group_count": 2, "n_hid": 8, "n_blk_per_group": 1, "n_init": 6, "vocab_size": 11}
PATCH = {**SMALL, "stem": "patch", "patch": 2}
BOTH = pytest.mark.parametrize("sizes", [SMALL, PATCH], ids=["released", "patch"])


def small_vae(sizes=SMALL, seed=0):
    torch.manual_seed(seed)
    return DiscreteVAE(DiscreteVAEConfig(**sizes)).eval()


def some_images(n=3, size=8, seed=1):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def released_shapes(side):
    """The released state dict, written out from paper.md A.1 and not from our loops."""
    encoder = side == "encoder"
    widths = [256, 512, 1024, 2048] if encoder else [2048, 1024, 512, 256]
    before = 256 if encoder else 128
    shapes = {"blocks.input": (256, 3, 7, 7) if encoder else (128, 8192, 1, 1)}
    for group, width in enumerate(widths, 1):
        for block in (1, 2):
            name, hid = f"blocks.group_{group}.block_{block}", width // 4
            if before != width:
                shapes[f"{name}.id_path"] = (width, before, 1, 1)
            ends = (3, 1) if encoder else (1, 3)
            shapes[f"{name}.res_path.conv_1"] = (hid, before, ends[0], ends[0])
            shapes[f"{name}.res_path.conv_2"] = (hid, hid, 3, 3)
            shapes[f"{name}.res_path.conv_3"] = (hid, hid, 3, 3)
            shapes[f"{name}.res_path.conv_4"] = (width, hid, ends[1], ends[1])
            before = width
    shapes["blocks.output.conv"] = (8192, 2048, 1, 1) if encoder else (6, 256, 1, 1)
    return shapes


@pytest.mark.parametrize(
    ("side", "convs", "count"), [("encoder", 37, 53_786_240), ("decoder", 38, 43_829_766)]
)
def test_paper_preset_has_the_released_names_shapes_and_counts(side, convs, count):
    with torch.device("meta"):
        module = getattr(DiscreteVAE.from_preset("paper"), side)
    want = {}
    for key, shape in released_shapes(side).items():
        want[f"{key}.w"], want[f"{key}.b"] = shape, shape[:1]
    assert len(want) == 2 * convs
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == want
    assert sum(p.numel() for p in module.parameters()) == count
    blocks = [m for m in module.modules() if isinstance(m, Block)]
    assert [block.post_gain for block in blocks] == [1 / 64] * 8


def test_presets_have_the_factor_their_groups_give():
    for name, factor in (("tiny", 4), ("small", 8), ("base", 8), ("paper", 8)):
        with torch.device("meta"):
            vae = DiscreteVAE.from_preset(name)
        assert vae.factor == factor and vae.grid(32) == (32 // factor, 32 // factor)
        assert vae.config.stem == "released"


def test_weights_begin_at_the_released_scale():
    torch.manual_seed(0)
    conv = Conv2d(16, 64, 3)
    assert float(conv.w.detach().std()) == pytest.approx(1 / math.sqrt(16 * 9), rel=0.03)
    assert float(conv.w.detach().mean()) == pytest.approx(0, abs=0.005)
    assert not conv.b.detach().any()


@pytest.mark.parametrize("kernels", [ENCODER_KERNELS, DECODER_KERNELS])
def test_block_is_skip_plus_gained_branch_with_relus_before_convs(kernels):
    torch.manual_seed(0)
    block, x = Block(4, 8, 3, kernels), torch.randn(2, 4, 5, 5)
    y = x
    for i in range(1, 5):
        conv = getattr(block.res_path, f"conv_{i}")
        y = F.conv2d(F.relu(y), conv.w, conv.b, padding="same")
    skip = F.conv2d(x, block.id_path.w, block.id_path.b)
    torch.testing.assert_close(block(x), skip + y / 9)


def test_encoder_pools_by_maximum_and_decoder_repeats():
    vae = small_vae()
    kinds = [type(m).__name__ for m in vae.modules()]
    assert kinds.count("MaxPool2d") == 1 and kinds.count("Upsample") == 1
    up = next(m for m in vae.modules() if isinstance(m, torch.nn.Upsample))
    assert up(torch.tensor([[[[1.0, 2.0]]]])).tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]


@BOTH
def test_encode_decode_round_trip_of_shapes(sizes):
    vae = small_vae(sizes)
    tokens = vae.encode(some_images(size=8))
    assert tokens.shape == (3, 4, 4) and tokens.dtype == torch.int64
    assert torch.equal(tokens, vae.logits(some_images(size=8)).argmax(1))
    images = vae.decode(tokens)
    assert images.shape == (3, 3, 8, 8)
    assert float(images.min()) >= 0 and float(images.max()) <= 1


@BOTH
def test_reconstruct_gives_what_encode_and_decode_give_in_any_batches(sizes):
    vae, images = small_vae(sizes), some_images(size=8)
    again, tokens = vae.reconstruct(images, batch_size=2)
    assert torch.equal(tokens, vae.encode(images)) and again.dtype == torch.float32
    torch.testing.assert_close(again, vae.decode(tokens))


@BOTH
def test_decoding_tokens_equals_the_one_hot_through_the_first_convolution(sizes):
    vae = small_vae(sizes)
    torch.nn.init.normal_(vae.decoder.codebook_conv().b)
    tokens = torch.randint(11, (2, 4, 3), generator=torch.Generator().manual_seed(3))
    one_hot = F.one_hot(tokens, 11).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        want = expected_pixels(vae.decoder(one_hot)[:, :3])
    torch.testing.assert_close(vae.decode(tokens), want)


@BOTH
def test_loss_is_the_bound_in_the_papers_units(sizes):
    vae, images, beta = small_vae(sizes), some_images(), 6.6
    out = vae(images, tau=0.7, kl_weight=beta, seed=5)
    with torch.no_grad():
        q = vae.logits(images).log_softmax(1)
        kl = (q.exp() * (q + math.log(11))).sum(1)  # (B, h, w)
        relaxed = dalle_ext_sample(vae, images, tau=0.7, seed=5)
        maps = vae.decoder(relaxed)
        log_f = logit_laplace_log_prob(map_pixels(images), maps[:, :3], maps[:, 3:])
        values = 8 * 8 * 3
        want = ((-log_f.sum((1, 2, 3)) + beta * kl.sum((1, 2))) / values).mean()
    torch.testing.assert_close(out.loss, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.kl, kl.mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.nll, (-log_f.sum((1, 2, 3)) / values).mean())
    assert 0 <= out.kl.item() <= math.log(11)


def dalle_ext_sample(vae, images, *, tau, seed):
    import dalle_ext

    return dalle_ext.gumbel_softmax(vae.logits(images), tau, dim=1, seed=seed).sample


def test_kl_does_not_feel_the_temperature_and_a_seed_repeats():
    vae, images = small_vae(), some_images()
    hot, cold = (vae(images, tau=tau, kl_weight=1.0, seed=9) for tau in (1.0, 1 / 16))
    assert torch.equal(hot.kl, cold.kl) and not torch.equal(hot.mu, cold.mu)
    assert torch.equal(hot.mu, vae(images, tau=1.0, kl_weight=1.0, seed=9).mu)
    assert not torch.equal(hot.mu, vae(images, tau=1.0, kl_weight=1.0, seed=10).mu)


@BOTH
def test_gradient_reaches_every_parameter(sizes):
    vae = small_vae(sizes).train()
    for _ in range(2):  # the patch form's branches begin at zero and pass gradient after a step
        vae.zero_grad()
        vae(some_images(), tau=1.0, kl_weight=0.1, seed=2).loss.backward()
        missing = [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter -= 0.01 * parameter.grad
    assert missing == []


def test_a_few_updates_lower_the_loss():
    vae = small_vae({**SMALL, "n_hid": 16}).train()
    images = some_images(4, size=1).expand(4, 3, 8, 8)  # one colour each
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    losses = []
    for step in range(60):
        loss = vae(images, tau=1.0, kl_weight=0.0, seed=step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5


@BOTH
def test_save_and_load(sizes, tmp_path):
    vae = small_vae(sizes)
    vae.save_pretrained(tmp_path)
    again = DiscreteVAE.from_pretrained(tmp_path)
    assert again.config == vae.config and not again.training
    assert torch.equal(again.logits(some_images()), vae.logits(some_images()))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(CheckpointError):
        DiscreteVAE.from_pretrained(tmp_path)


@BOTH
def test_training_keeps_channels_innermost_in_memory(sizes, monkeypatch):
    """Every convolution forward, and the codes that the Gumbel-softmax reads, gives and gets back
    as a gradient: where they are strided it takes twice the time on a GPU."""
    vae, found = small_vae(sizes), {}

    def innermost(name, x):
        found[name] = x.permute(0, 2, 3, 1).is_contiguous()

    for name, part in vae.named_modules():
        if isinstance(part, Conv2d):
            part.register_forward_pre_hook(lambda _, args, name=name: innermost(name, args[0]))
    real = dalle_ext.gumbel_softmax

    def watched(logits, *args, **options):
        relaxed = real(logits, *args, **options)
        innermost("logits", logits), innermost("sample", relaxed.sample)
        relaxed.sample.register_hook(lambda grad: innermost("gradient", grad))
        return relaxed

    monkeypatch.setattr(dalle_ext, "gumbel_softmax", watched)
    vae(some_images(), tau=0.5, kl_weight=1.0, seed=0).loss.backward()
    assert set(found) >= {"logits", "sample", "gradient", "encoder.blocks.input"}
    assert [name for name, holds in found.items() if not holds] == []
    found.clear()
    vae.decode(vae.encode(some_images()))
    assert all(found.values())


def test_autoencode_skips_the_codes():
    vae, images = small_vae(PATCH), some_images()
    mu, nll = vae.autoencode(images)
    assert mu.shape == images.shape and nll.dim() == 0
    with torch.no_grad():
        vae.decoder.codebook_conv().w.zero_()
    assert torch.equal(vae.autoencode(images)[0], mu)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.rand(1, 1, 8, 8), r"\(1, 1, 8, 8\)"),
        (torch.rand(1, 3, 9, 8), r"divisible by 2, got \(1, 3, 9, 8\)"),
        (torch.rand(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
    ],
)
def test_bad_images_get_one_line(images, said):
    with pytest.raises(UsageError, match=said) as caught:
        small_vae().encode(images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), r"\(B, h, w\) int64, got \(2, 4\)"),
        (torch.zeros(1, 2, 2), "torch.float32"),
        (torch.full((1, 2, 2), 11), "lie in 0 .. 10, got 11 .. 11"),
        (torch.full((1, 2, 2), -1), "got -1 .. -1"),
    ],
)
def test_bad_tokens_get_one_line(tokens, said):
    with pytest.raises(UsageError, match=said):
        small_vae().decode(tokens)


def test_bad_sizes_get_one_line():
    with pytest.raises(UsageError, match="preset must be one of .*, got 'smal'"):
        DiscreteVAE.from_preset("smal")
    with pytest.raises(UsageError, match="n_hid must be a multiple of 4, got 6"):
        DiscreteVAEConfig(n_hid=6)
    with pytest.raises(UsageError, match="vocab_size must be at least 1, got 0"):
        DiscreteVAEConfig(vocab_size=0)
    with pytest.raises(UsageError, match="stem must be one of .*, got 'conv'"):
        DiscreteVAEConfig(stem="conv")
    with pytest.raises(UsageError, match="image_size must be a multiple of 2, got 9"):
        small_vae().grid(9)
