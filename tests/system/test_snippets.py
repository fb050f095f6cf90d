"""The Python code that README and docs print runs as printed, and gives what its page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dalle_ext
from dalle.commands.dvae_import import import_released
from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.pipeline import Pipeline
from dalle.precision import ResblockScaler
from dalle.prior.config import PriorConfig
from dalle.prior.decode import Decoder
from dalle.prior.model import Prior
from dalle.ranker.model import ContrastiveRanker
from dalle.tokenizer import Tokenizer
from support.evaluation import make_eval_home

ROOT = Path(__file__).resolve().parents[2]
LAB_BOOK = "docs/log.md"  # its code is that of its day


def snippets():
    """Page -> the Python blocks that it prints."""
    found = {}
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]:
        blocks = re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.M | re.S)
        if blocks:
            found[str(path.relative_to(ROOT))] = blocks
    found.pop(LAB_BOOK, None)
    return found


BLOCKS = snippets()


def run(page, number, names=None):
    """The names that block `number` of a page leaves, begun with `names`."""
    names = {} if names is None else names
    torch.manual_seed(0)
    exec(compile(BLOCKS[page][number], f"{page}, block {number}", "exec"), names)
    return names


def test_every_block_is_run_here():
    assert {page: len(blocks) for page, blocks in BLOCKS.items()} == {
        "README.md": 3,
        "docs/distributed.md": 2,
        "docs/editing.md": 1,
        "docs/evaluation.md": 1,
        "docs/ops.md": 4,
        "docs/precision.md": 2,
        "docs/released_dvae.md": 1,
        "docs/sampling.md": 2,
        "docs/training.md": 1,
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the pipelines that the pages load, of a tiny untrained model."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a caption", "woman firefighter"] * 4, vocab_size=280)
    shape = {"n_hid": 8, "n_blk_per_group": 1, "n_init": 8, "vocab_size": 16}
    vae = DiscreteVAE(DiscreteVAEConfig(stem="patch", patch=8, **shape)).eval()
    prior = Prior(
        PriorConfig(text_vocab=280, image_vocab=16, text_len=8, grid=(4, 4), d_model=32,
                    num_heads=2, num_layers=2, kernel_size=3)
    ).eval()  # fmt: skip
    ranker = ContrastiveRanker.from_preset(
        "tiny", tokenizer=tokenizer, image_size=32, grid=4, width=32, depth=1, embed_dim=16
    ).eval()
    for parameter in (*prior.image_head.parameters(), *ranker.parameters()):
        nn.init.normal_(parameter)  # so that one candidate is not the other
    pipeline = Pipeline(tokenizer, vae, prior, ranker)
    for place in ("out/demo/pipeline", "run/pipeline"):
        pipeline.save_pretrained(folder / place)
    return folder


def check_attention(page, names):
    """The equivalent line that the next block prints gives the same."""
    found = names["out"]
    torch.testing.assert_close(run(page, 1, names)["out"], found, rtol=1e-4, atol=1e-5)
    assert found.shape == (2, 8, 1280, 64) and names["pattern"].density < 0.6


def check_best(best, count):
    assert best.images.shape == (count, 3, 32, 32)
    assert 0 <= float(best.images.min()) < float(best.images.max()) <= 1
    assert bool((best.scores.diff() <= 0).all()) and best.scores[0] > best.scores[-1]


def test_readme(home, monkeypatch):
    monkeypatch.chdir(home)
    names = run("README.md", 0)
    check_best(names["best"], 4)
    check_attention("README.md", names)


def test_readme_scales_two_branches():
    """The gradient norm is that of the same layer without the hooks."""
    names = run("README.md", 2, {"torch": torch})
    layer, scaler = names["layer"].eval(), names["scaler"]
    plain = torch.nn.TransformerEncoderLayer(64, 4, 256, norm_first=True).eval()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(8, 10, 64, requires_grad=True)
    for model in (layer, plain):
        model(x).square().mean().backward()
    wanted = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
    scaled = torch.cat([p.grad.flatten() for p in layer.parameters()]).norm()
    result = scaler.step(torch.optim.SGD(layer.parameters(), lr=1e-3))
    assert len(scaler) == 2 and not bool(result.skipped) and float(scaled) > 100 * float(wanted)
    assert float(result.norm) == pytest.approx(float(wanted), rel=1e-4)


def test_ops():
    check_attention("docs/ops.md", run("docs/ops.md", 0))
    names = run("docs/ops.md", 2)
    assert names["out"].shape == (1, 16, 8, 64) and int(names["slot"]) == 1024
    names = run("docs/ops.md", 3)
    assert names["x"].shape == (1, 384) and bool(names["x"].isfinite().all())


def test_training(home, monkeypatch):
    monkeypatch.chdir(home)
    names = run("docs/training.md", 0)
    for generation in (names["best"], names["first"], names["second"]):
        check_best(generation, 4)
    assert torch.equal(names["best"].images, names["first"].images)
    assert not torch.equal(names["first"].images, names["second"].images)


def test_editing(home, monkeypatch):
    monkeypatch.chdir(home)
    names = run("docs/editing.md", 0)
    image, kept = names["image"], names["keep"].repeat_interleave(8, 0).repeat_interleave(8, 1)
    check_best(names["edited"], 2)
    assert torch.equal(names["edited"].images[0][:, kept], image[:, kept])


def test_sampling(home, monkeypatch):
    monkeypatch.chdir(home)
    names = run("docs/sampling.md", 0)
    check_best(names["best"], 8)
    assert torch.equal(names["event"].generation.images, names["best"].images)
    index = torch.arange(64).flip(0)[None]
    given = {"prior": names["pipeline"].prior, "text": torch.zeros(1, 7, dtype=torch.int64)}
    given |= {"prime": torch.zeros(1, 3, dtype=torch.int64), "slot": 3, "index": index}
    given |= {"previous": torch.zeros(1, 64, dtype=torch.int64), "Decoder": Decoder}
    assert run("docs/sampling.md", 1, given)["logits"].shape == (1, 64, 16)


def test_precision_hooks():
    """A loss of 1.4 at first; to say zero costs 1."""
    names = run("docs/precision.md", 0)
    assert float(names["loss"]) < 0.75
    scaler = names["scaler"]
    assert len(scaler) == 4 and scaler.updates == 30 and scaler.metrics()["skipped"] == 0
    checked = {name: scaler[name].checked for name in scaler.names}
    assert not checked.pop("0.attention") and all(checked.values())  # its input needs no gradient


def test_precision_ends_in_the_code():
    make = run("docs/precision.md", 1, {"nn": nn})["Block"]
    block = make(16, nn.Linear(16, 16).half())
    scaler = ResblockScaler({"0": block})
    block.ends = scaler["0"]
    x = torch.randn(8, 16, requires_grad=True)
    y = block(x)
    y.square().mean().backward()
    plain = x.detach().clone().requires_grad_()
    wanted = plain + nn.functional.linear(
        block.norm(plain), block.branch.weight.float(), block.branch.bias.float()
    )
    torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-2)
    (found,) = torch.autograd.grad(wanted.square().mean(), plain)
    torch.testing.assert_close(x.grad, found, rtol=1e-2, atol=1e-3)
    assert block.ends.checked and y.dtype == torch.float32


@pytest.fixture
def group(tmp_path):
    """This process alone, as DDP and FSDP2 want one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Wide(nn.Module):
    """Two matrices that rank 112 makes smaller, and two heads."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(2))
        self.text_head, self.image_head = nn.Linear(512, 3), nn.Linear(512, 4)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.text_head(x).square().mean() + self.image_head(x).square().mean()


def test_distributed(group, capsys):
    """Gradients of a batch of 8 have rank 8, so that they come through as they were."""
    torch.manual_seed(0)
    plain, x = Wide(), torch.randn(8, 512)
    plain(x).backward()
    wanted = [p.grad for p in plain.parameters()]

    def mesh(kind, shape, **options):
        assert kind == "cuda" and shape == (1, 8)
        return init_device_mesh("cpu", (1, 1), **options)

    names = {"machines": 1, "init_device_mesh": mesh, "fully_shard": fully_shard}
    for number, engine in enumerate(("ddp", "fsdp")):  # the second goes on from the first
        torch.manual_seed(0)
        model = Wide()
        if engine == "ddp":
            model = DistributedDataParallel(model)
        names |= {"ddp_model": model, "model": model}
        run("docs/distributed.md", number, names)
        model(x).backward()
        for parameter, grad in zip(model.parameters(), wanted, strict=True):
            found = dalle_ext.local_part(parameter.grad)
            assert (found - grad).norm() <= 5e-3 * grad.norm() + 1e-9, engine
        assert len(names["psgd"].compressor.matrices) == 2, engine
    assert "nothing was sent" in capsys.readouterr().out


def test_released_dvae(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DiscreteVAEConfig(n_hid=8, n_init=6, vocab_size=16)
    vae = DiscreteVAE(config).eval()
    for name in ("encoder", "decoder"):
        torch.save(getattr(vae, name), f"{name}.pkl")
    run("docs/released_dvae.md", 0)
    found = import_released(
        tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors", config
    )
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name


def test_evaluation_distance_and_function(tmp_path, monkeypatch):
    make_eval_home(tmp_path)
    monkeypatch.chdir(tmp_path)
    a, b = torch.randn(40, 4), torch.randn(30, 4)
    names = run("docs/evaluation.md", 0, {"a": a, "b": b})
    assert 0 < names["frechet_distance"](a, b) < 3 and 0 < names["value"] < 4
