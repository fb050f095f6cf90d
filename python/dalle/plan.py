"""Sizes of a prior from its configuration alone, on one device and on many machines.

T = text_len + rows * columns positions, width d, L layers. Nothing is instantiated;
`tests/system/test_plan.py` compares with the module on the meta device.

Of many machines (paper appendix E.1, Tables 1 and 2) each holds one copy of the parameters, sharded
over its m GPUs along axis 1, the second MLP matrix along axis 0; PowerSGD between machines
compresses each shard with rank r / m.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from dalle.configs import integer
from dalle.errors import UsageError

if TYPE_CHECKING:
    from dalle.prior.config import PriorConfig

GIB = 2**30
# Values of width d that one layer keeps for backward, per position. The residual stream enters
# twice (before each LayerNorm); inside the resblocks are the LayerNorms' outputs (2), q, k, v (3),
# the attention's output (1), and the MLP's hidden layer before and after its nonlinearity (8).
# The operator keeps no matrix of scores, only one fp32 number per head and position.
STREAM_PER_LAYER = 2
BRANCH_PER_LAYER = 14
WIDEST_BRANCH = 9  # the MLP's; under checkpointing one branch is alive at a time

PRECISIONS: dict[str, dict[str, int]] = {
    # bytes a value; "copies" are the bf16 weights that backward needs, "stream" the identity path
    "fp32": {
        "weights": 4,
        "copies": 0,
        "gradients": 4,
        "moments": 8,
        "average": 4,
        "stream": 4,
        "branch": 4,
    },
    "bf16": {
        "weights": 4,
        "copies": 2,
        "gradients": 4,
        "moments": 8,
        "average": 4,
        "stream": 4,
        "branch": 2,
    },
    # all in 16 bits, the moments in 1-6-9 and 0-6-10, the average in host memory
    "paper": {
        "weights": 2,
        "copies": 0,
        "gradients": 2,
        "moments": 4,
        "average": 0,
        "stream": 2,
        "branch": 2,
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
    block = tokens * (BRANCH_PER_LAYER * d * size["branch"] + 4 * shape.num_heads)
    parts: dict[str, float] = {
        "weights": count * (size["weights"] + size["copies"]),
        "gradients": count * size["gradients"],
        "moments": count * size["moments"],
        "average": count * size["average"],
        "logits": 2 * 4 * batch * num_logits(shape),
    }
    fixed = sum(parts.values())
    parts["activations"] = stream + shape.num_layers * block
    widest = tokens * WIDEST_BRANCH * d * size["branch"]
    parts["activations_checkpointed"] = stream + widest
    parts["total"] = fixed + parts["activations"]
    parts["total_checkpointed"] = fixed + parts["activations_checkpointed"]
    parts["cache_per_image"] = 2 * shape.num_layers * shape.length * d * size["branch"]
    return parts


def make_plan(name: str, shape: PriorConfig, batch: int) -> dict[str, Any]:
    """Parameters, FLOPs and memory of one configuration, as JSON values.

    Raises:
        UsageError: for a batch below 1.
    """
    batch = integer("plan", "batch", batch)
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


PAPER_RANKS = {1920: 512, 2688: 640, 3968: 896}  # Table 1: width -> least rank without a loss gap
WORD, WIDE = 2, 4  # bytes of fp16 and 1-6-9, of fp32
MACHINES = (1, 8, 64)


def shards(width: int, gpus: int) -> list[tuple[int, int]]:
    """(rows, columns) of each matrix's shard in one layer: q, k, v, output, both of the MLP."""
    d, m = width, gpus
    return [(d, d // m)] * 4 + [(d, 4 * d // m), (4 * d // m, d)]


def factor_elements(width: int, gpus: int, rank: int) -> tuple[int, int]:
    """Elements of P and of Q for one layer's shards; each GPU has an equal part of the rank."""
    local = rank // gpus
    shapes = shards(width, gpus)
    return sum(rows * local for rows, _ in shapes), sum(columns * local for _, columns in shapes)


def compression(width: int, gpus: int, rank: int) -> float:
    """Share of the gradient that is not sent: 1 - (P + Q) / shards."""
    total = sum(rows * columns for rows, columns in shards(width, gpus))
    return 1 - sum(factor_elements(width, gpus, rank)) / total


def default_rank(width: int, gpus: int) -> int:
    """The paper's rank for this width, or the same share of the width as in its largest model."""
    return PAPER_RANKS.get(width) or max(1, round(896 / 3968 * width / gpus)) * gpus


def traffic(shape: PriorConfig, machines: int, gpus: int, rank: int) -> dict[str, float]:
    """Bytes that one GPU sends in one step (and receives), by kind.

    "gather" (twice) and "scatter" stay inside the machine, in fp16. Between machines, as ring
    all-reduces: "factors" in 1-6-9, "rest" (embeddings, heads, gains, biases) in fp32, and, in
    their place, all gradients in fp16: "uncompressed".
    """
    count, d = parameters(shape), shape.d_model
    ring = 2 * (machines - 1) / machines
    share = (gpus - 1) / gpus
    matrices = 12 * d * d * shape.num_layers
    factors = sum(factor_elements(d, gpus, rank)) * shape.num_layers
    others = (count["total"] - matrices) / gpus
    return {
        "gather": 2 * share * matrices * WORD,
        "scatter": share * matrices * WORD,
        "factors": ring * factors * WORD,
        "rest": ring * others * WIDE,
        "uncompressed": ring * (matrices / gpus * WORD + others * WIDE),
    }


def memory_of_gpu(shape: PriorConfig, batch: int, gpus: int, compressed: bool) -> dict[str, float]:
    """Bytes on one GPU with everything in the paper's formats and activation checkpointing."""
    full = memory(shape, batch, "paper")
    matrices = 12 * shape.d_model**2 * shape.num_layers
    layer = matrices / shape.num_layers
    others = parameters(shape)["total"] - matrices
    parts = {
        "weights": full["weights"] / gpus,
        "gathered_layers": 2 * layer * WORD,  # this one and the prefetched next
        # Compressed gradients are added to the error buffers at once.
        "gradients": (others * WIDE if compressed else full["gradients"]) / gpus,
        "error_buffers": matrices / gpus * WORD if compressed else 0.0,
        "moments": full["moments"] / gpus,
        "logits": full["logits"],
        "activations": full["activations_checkpointed"],
    }
    return {**parts, "total": sum(parts.values())}


def cluster_plan(
    shape: PriorConfig,
    *,
    gpus: int,
    per_machine: int,
    batch: int,
    rank: int | None,
    tflops: float,
    link_gbit: float,
    peer_gbyte: float,
) -> dict[str, Any]:
    """Traffic, memory and the step's time for `gpus` GPUs, and for 1, 8 and 64 machines.

    Times: compute is the step's operations at `tflops` a GPU; what stays in the machine runs beside
    it; half of what goes between machines does (a backward pass is two thirds of the step, and the
    last blocks' exchange has nothing left to hide behind). A prediction, not a measurement.

    Args:
        gpus, per_machine: GPUs in all, and in one machine.
        batch: sequences a GPU.
        rank: in all, a multiple of `per_machine`; None for the paper's.
        tflops: what one GPU reaches.
        link_gbit: of one machine to the others, Gbit/s; its GPUs share it.
        peer_gbyte: from GPU to GPU in a machine, GB/s.

    Raises:
        UsageError: sizes that do not divide, or numbers that are not positive.
    """
    gpus, batch = integer("plan", "gpus", gpus), integer("plan", "batch", batch)
    per_machine = integer("plan", "per_machine", per_machine)
    rank = None if rank is None else integer("plan", "rank", rank)
    options = {
        "gpus": gpus,
        "per_machine": per_machine,
        "batch": batch,
        "tflops": tflops,
        "link_gbit": link_gbit,
        "peer_gbyte": peer_gbyte,
    }
    for name, value in options.items():
        _check(0 < value < math.inf, name, "above 0 and finite", value)
        _check(value >= 1e-3, name, "at least 0.001", value)
    _check(gpus % per_machine == 0, "gpus", f"a multiple of {per_machine} a machine", gpus)
    d = shape.d_model
    _check(d % per_machine == 0, "per_machine", f"a divisor of the width {d}", per_machine)
    rank = default_rank(d, per_machine) if rank is None else rank
    fits = 0 < rank <= d and rank % per_machine == 0
    _check(fits, "rank", f"a multiple of {per_machine} from {per_machine} to {d}", rank)
    compute = flops(shape, batch)["step_checkpointed"] / (tflops * 1e12)
    columns: dict[str, Any] = {}
    for machines in sorted({*MACHINES, gpus // per_machine}):
        sent = traffic(shape, machines, per_machine, rank)
        within = (sent["gather"] + sent["scatter"]) / (peer_gbyte * 1e9)
        link = link_gbit * 1e9 / 8 / per_machine
        between = (sent["factors"] + sent["rest"]) / link
        columns[str(machines)] = {
            "traffic": sent,
            "seconds": {
                "compute": compute,
                "inside_machine": within,
                "between_machines": between,
                "step": max(compute, within) + max(0.0, between - compute / 2),
                "step_uncompressed": max(compute, within)
                + max(0.0, sent["uncompressed"] / link - compute / 2),
            },
            "memory_bytes": memory_of_gpu(shape, batch, per_machine, machines > 1),
        }
    table1 = {w: {"rank": r, "compression": compression(w, 8, r)} for w, r in PAPER_RANKS.items()}
    return {
        **options,
        "rank": rank,
        "compression": compression(d, per_machine, rank),
        "table1": table1,
        "machines": columns,
    }


def cluster_text(plan: dict[str, Any]) -> str:
    """A plan for people to read."""
    gib, machines = 2**30, list(plan["machines"].values())
    heads = "".join(f"{'x ' + name:>12}" for name in plan["machines"])
    lines = [
        f"{plan['gpus']} GPUs, {plan['per_machine']} a machine, batch {plan['batch']} a GPU, rank "
        f"{plan['rank']} ({plan['rank'] // plan['per_machine']} a GPU): compression "
        f"{plan['compression']:.1%}",
        "paper's Table 1: "
        + ", ".join(
            f"width {w} rank {row['rank']} {row['compression']:.0%}"
            for w, row in plan["table1"].items()
        ),
        "",
        f"{'machines':<26}{heads}",
    ]
    units = (("traffic", "GB a GPU", 1e9), ("memory_bytes", "GiB a GPU", gib))
    for key, unit, by in units:
        lines.append(f"{key.removesuffix('_bytes')}, {unit}")
        for part in machines[0][key]:
            values = "".join(f"{m[key][part] / by:>12.3f}" for m in machines)
            lines.append(f"  {part:<24}{values}")
    lines.append(
        f"seconds a step (predicted), {plan['tflops']:g} TFLOP/s, link {plan['link_gbit']:g} "
        f"Gbit/s, peers {plan['peer_gbyte']:g} GB/s"
    )
    for part in machines[0]["seconds"]:
        values = "".join(f"{m['seconds'][part]:>12.3f}" for m in machines)
        lines.append(f"  {part:<24}{values}")
    return "\n".join(lines)


def _check(holds: bool, name: str, requirement: str, value: Any) -> None:
    if not holds:
        raise UsageError(f"plan: {name} must be {requirement}, got {value}")
