"""Sizes of a prior from its configuration alone: parameters, memory by part, FLOPs of a step.

T = text_len + rows * columns positions, width d, L layers. Nothing is instantiated;
`tests/dalle/test_plan.py` compares with the module on the meta device.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from dalle.configs import whole
from dalle.errors import UsageError

if TYPE_CHECKING:
    from dalle.prior_config import PriorConfig

GIB = 2**30
# Values of width d that one layer keeps for backward, per position. The residual stream enters
# twice (before each LayerNorm); inside the resblocks are the LayerNorms' outputs (2), q, k, v (3),
# the attention's output (1), and the MLP's hidden layer before and after its nonlinearity (8).
# The operator keeps no matrix of scores, only one fp32 number per head and position.
STREAM_PER_LAYER = 2
INSIDE_PER_LAYER = 14
INSIDE_WIDEST_RESBLOCK = 9  # of the MLP; all that is alive at once under checkpointing

PRECISIONS: dict[str, dict[str, int]] = {
    # bytes a value; "copies" are the bf16 weights that backward needs, "stream" the identity path
    "fp32": {
        "weights": 4,
        "copies": 0,
        "gradients": 4,
        "moments": 8,
        "average": 4,
        "stream": 4,
        "inside": 4,
    },
    "bf16": {
        "weights": 4,
        "copies": 2,
        "gradients": 4,
        "moments": 8,
        "average": 4,
        "stream": 4,
        "inside": 2,
    },
    # all in 16 bits, the moments in 1-6-9 and 0-6-10, the average in host memory
    "paper": {
        "weights": 2,
        "copies": 0,
        "gradients": 2,
        "moments": 4,
        "average": 0,
        "stream": 2,
        "inside": 2,
    },
}


def text_classes(shape: PriorConfig) -> int:
    """Classes of the text head."""
    return shape.text_vocab + (shape.text_targets == "padded")


def num_logits(shape: PriorConfig) -> int:
    """Logits of one sequence: start-of-text is no target, every image token is."""
    return (shape.text_len - 1) * text_classes(shape) + shape.num_image_tokens * shape.image_vocab


def parameters(shape: PriorConfig) -> dict[str, int]:
    """Parameters by part (paper B.1, Fig. 10); "effective" is the paper's count, 12 d^2 L.

    The parts: embeddings (start-of-text and start-of-image vectors, token tables), positions (text,
    padding, rows, columns), attention (q, k, v, output, with biases), mlp (d to 4d to d, with
    biases), norms (two a layer and a final one), unembeddings (two heads, with biases).
    """
    d, layers = shape.d_model, shape.num_layers
    parts = {
        "embeddings": d * (2 + shape.text_vocab + shape.image_vocab),
        "positions": d * (2 * shape.text_len + sum(shape.grid)),
        "attention": layers * (4 * d * d + 4 * d),
        "mlp": layers * (8 * d * d + 5 * d),
        "norms": (2 * layers + 1) * 2 * d,
        "unembeddings": (d + 1) * (text_classes(shape) + shape.image_vocab),
    }
    return {**parts, "total": sum(parts.values()), "effective": 12 * d * d * layers}


def flops(shape: PriorConfig, batch: int) -> dict[str, float]:
    """Floating-point operations (a multiply-add counts two) of one training step.

    Forward of the matrices: 2 per weight and position; of the attention: 4 d per attended pair and
    layer (scores, and the weighted sum of values). Backward is twice the forward; activation
    checkpointing repeats the layers' forward.
    """
    d, length = shape.d_model, shape.length
    matrices = 2.0 * 12 * d * d * shape.num_layers * length
    pairs = sum(pattern.num_pairs for pattern in shape.patterns())
    attention = 4.0 * d * pairs
    logits = 2.0 * d * num_logits(shape)
    forward = matrices + attention + logits
    return {
        "forward_matrices": batch * matrices,
        "forward_attention": batch * attention,
        "forward_logits": batch * logits,
        "step": 3 * batch * forward,
        "step_checkpointed": batch * (3 * forward + matrices + attention),
        "per_token": 3 * forward / length,
    }


def memory(shape: PriorConfig, batch: int, precision: str) -> dict[str, float]:
    """Bytes by part while training `batch` sequences on one device.

    "activations" is what all layers keep for backward; "activations_checkpointed" keeps each
    resblock's input and the inside of one. "logits" and their gradient are fp32. "average" is the
    fp32 copy of iterate averaging. "cache_per_image" is the keys and values of one sampled picture.
    """
    size = PRECISIONS[precision]
    count, d = parameters(shape)["total"], shape.d_model
    tokens = batch * shape.length
    stream = shape.num_layers * STREAM_PER_LAYER * tokens * d * size["stream"]
    inside = tokens * (INSIDE_PER_LAYER * d * size["inside"] + 4 * shape.num_heads)
    parts: dict[str, float] = {
        "weights": count * (size["weights"] + size["copies"]),
        "gradients": count * size["gradients"],
        "moments": count * size["moments"],
        "average": count * size["average"],
        "logits": 2 * 4 * batch * num_logits(shape),
    }
    fixed = sum(parts.values())
    parts["activations"] = stream + shape.num_layers * inside
    widest = tokens * INSIDE_WIDEST_RESBLOCK * d * size["inside"]
    parts["activations_checkpointed"] = stream + widest
    parts["total"] = fixed + parts["activations"]
    parts["total_checkpointed"] = fixed + parts["activations_checkpointed"]
    parts["cache_per_image"] = 2 * shape.num_layers * shape.length * d * size["inside"]
    return parts


def make_plan(name: str, shape: PriorConfig, batch: int) -> dict[str, Any]:
    """Everything above for one configuration, as JSON values.

    Raises:
        UsageError: for a batch below 1.
    """
    batch = whole("plan", "batch", batch)
    if batch < 1:
        raise UsageError(f"plan: batch must be 1 or more, got {batch}")
    kinds = Counter(pattern.kind for pattern in shape.patterns())
    return {
        "preset": name,
        "d_model": shape.d_model,
        "num_heads": shape.num_heads,
        "num_layers": shape.num_layers,
        "positions": shape.length,
        "layers": dict(kinds),
        "batch": batch,
        "parameters": parameters(shape),
        "flops": flops(shape, batch),
        "memory_bytes": {p: memory(shape, batch, p) for p in PRECISIONS},
    }


def plan_text(plan: dict[str, Any]) -> str:
    """A plan for people to read."""
    layers = ", ".join(f"{count} {kind}" for kind, count in plan["layers"].items())
    lines = [
        f"prior {plan['preset']}: width {plan['d_model']}, {plan['num_heads']} heads, "
        f"{plan['num_layers']} layers ({layers}), {plan['positions']} positions",
        "",
        "parameters",
    ]
    lines += [f"  {part:<24} {count:>17,}" for part, count in plan["parameters"].items()]
    lines += ["", f"FLOPs, batch {plan['batch']} (per_token: training, one position)"]
    lines += [f"  {part:<24} {value:>17.4g}" for part, value in plan["flops"].items()]
    precisions = list(plan["memory_bytes"])
    heads = "".join(f"{p:>12}" for p in precisions)
    lines += ["", f"{'memory in GiB, batch ' + str(plan['batch']):<26}{heads}"]
    for part in plan["memory_bytes"][precisions[0]]:
        sizes = "".join(f"{plan['memory_bytes'][p][part] / GIB:>12.3f}" for p in precisions)
        lines.append(f"  {part:<24}{sizes}")
    return "\n".join(lines)
