"""No tensor of the library takes its dtype or device from a global.

`torch.set_default_dtype`, `torch.set_default_device` and `with torch.device(...)` belong to the
user. Parameters of modules follow the device of the context, as torch's own do ("meta"), never the
dtype.
"""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import dalle_ext
from dalle.dvae.codebook import kmeans
from dalle.dvae.model import DiscreteVAE, DiscreteVAEConfig
from dalle.prior.config import PriorConfig
from dalle.prior.model import Prior
from dalle.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace",
    "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor",
    "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
MODULES = {
    "BatchNorm2d", "Conv1d", "Conv2d", "ConvTranspose2d", "Embedding", "GroupNorm", "LayerNorm",
    "Linear", "MultiheadAttention", "RMSNorm", "TransformerEncoderLayer",
}  # fmt: skip


def name_of(call: ast.Call) -> tuple[str, str]:
    """("torch", "zeros") of `torch.zeros(...)`."""
    function = call.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return function.value.id, function.attr
    return "", ""


def calls_in(path: Path) -> list[tuple[ast.Call, bool]]:
    """The calls of a file, and whether each stands inside `nn.Parameter(...)`."""
    found = []

    def walk(node: ast.AST, parameter: bool) -> None:
        if isinstance(node, ast.Call):
            found.append((node, parameter))
            parameter = parameter or name_of(node) == ("nn", "Parameter")
        for child in ast.iter_child_nodes(node):
            walk(child, parameter)

    walk(ast.parse(path.read_text()), False)
    return found


@pytest.mark.parametrize("folder", ["dalle_ext", "python/dalle"])
def test_every_allocation_names_its_dtype_and_device(folder):
    missing = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for call, parameter in calls_in(path):
            module, name = name_of(call)
            given = {keyword.arg for keyword in call.keywords}
            wanted = set()
            if module == "torch" and name in FACTORIES:
                wanted = {"dtype"} if parameter else {"dtype", "device"}
            elif module == "nn" and name in MODULES:
                wanted = {"dtype"}
            if not wanted <= given:
                lacks = " and ".join(sorted(wanted - given))
                missing.append(f"{path.relative_to(ROOT)}:{call.lineno}: {name} without {lacks}")
    assert missing == [], "\n".join(missing)


@contextmanager
def other_globals(dtype, device):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def a_bit_of_everything():
    """Tensors that models, sampling, training's draws and ops compute, from fixed seeds."""
    x = torch.linspace(-1, 1, 2 * 40 * 16, dtype=torch.float32, device="cpu").view(1, 2, 40, 16)
    pattern = dalle_ext.AttentionPattern("conv", text_len=4, grid=(6, 6), offsets=(0, 1, 6))
    found = [pattern.mask(), dalle_ext.sparse_attention(x, x, x, pattern)]
    found += decode_attention_of(x)
    found += [*dalle_ext.gumbel_softmax(x, 0.5, seed=1)]
    codes = dalle_ext.pack(x, "1-6-9", rounding="stochastic", seed=2)
    found += [codes, dalle_ext.unpack(codes, "1-6-9")]
    found += [*dalle_ext.sum_codes(codes, "1-6-9"), *dalle_ext.scale_gradient(x, 2.0)]
    found += [*dalle_ext.unscale_gradients_([x.clone()], 2.0)]
    with torch.device("cpu"):  # as the parameters of torch's own modules: where the user wants them
        torch.manual_seed(0)
        sizes = {"text_vocab": 20, "image_vocab": 16, "text_len": 4, "grid": (4, 4)}
        prior = Prior(PriorConfig(d_model=32, num_heads=2, num_layers=2, **sizes))
        config = {"n_hid": 8, "n_blk_per_group": 1, "n_init": 8, "vocab_size": 16}
        vae = DiscreteVAE(DiscreteVAEConfig(stem="patch", patch=8, **config))
    found += [*prior.state_dict().values(), *vae.state_dict().values()]
    text = torch.tensor([[1, 2, -1]], dtype=torch.int64, device="cpu")
    tokens = prior.generate(text, num_samples=2, seed=3, top_k=5, cond_scale=2.0)
    pictures = vae.decode(tokens[0])
    found += [tokens, pictures, vae.encode(pictures), captions()]
    found += [kmeans(x.view(-1, 16), 4, iterations=2, seed=5)[0]]
    return [tensor.detach() for tensor in found]


def decode_attention_of(x):
    """Of x (1, 2, 40, 16): a column cache in 8 bits, filled, decoded into and reordered."""
    pattern = dalle_ext.AttentionPattern("column", text_len=4, grid=(6, 6))
    cache = dalle_ext.DecodeCache(pattern, x[:, :, :4], x[:, :, :4], 3, bits=8)
    cache.fill(x[:, :, 4:11], x[:, :, 5:12])
    row, slot = x[:, :, 20:23].transpose(1, 2), torch.tensor(7, dtype=torch.int64, device="cpu")
    out = dalle_ext.decode_attention(row, row, row, cache, slot)
    cache.reorder(torch.tensor([[2, 0, 0]], dtype=torch.int64, device="cpu"))
    return [out, cache.image_keys, cache.key_scales, cache.image_values]


def captions():
    tokenizer = Tokenizer.train(["a red square", "a blue circle"], 260)
    return tokenizer.encode(["a red circle"], 6, dropout=0.5, seed=7)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_globals_change_no_bit(dtype, reference):
    with dalle_ext.use_reference(reference):
        wanted = a_bit_of_everything()
        with other_globals(dtype, "meta"):
            found = a_bit_of_everything()
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert (one.dtype, one.device) == (other.dtype, other.device), i
        assert torch.equal(one, other), i
