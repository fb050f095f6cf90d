"""Whether what lies between the two ends of a branch is one branch, read from autograd's graph.

Backward, all gradients between the ends carry the block's scale. One that leaves by another way
than the first end, such as an identity path, keeps it, and the next block multiplies it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Node = Any  # torch.autograd.graph.Node; a custom function's has attributes of its own

# Gradients pass these to their first operand as they are; AddBackward0 to both.
SUMS = {"AddBackward0", "SubBackward0", "AddcmulBackward0", "AddmmBackward0", "BaddbmmBackward0"}
FORMS = {
    "AliasBackward0",
    "CloneBackward0",
    "PermuteBackward0",
    "RegisterPostBackwardFunctionBackward",  # of FSDP2
    "ReshapeAliasBackward0",
    "SelectBackward0",
    "SliceBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "TBackward0",
    "ToCopyBackward0",
    "TransposeBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}
IDENTITY = (
    "an identity path inside, or its input as a second argument: "
    "a block of two residual sums is two blocks, each with a hook"
)
ADDS_INPUT = "a block that adds its own input: hook the branch inside the sum"


def fault_of(
    output: Tensor,
    enter: type,
    leave: type,
    owned: Callable[[Tensor], bool] | None = None,
    branch_input: Tensor | None = None,
) -> str | None:
    """What is wrong with a branch, in words; None where nothing is.

    Costs a visit of each node of the branch: 15 to 60 us for one of a transformer.

    Args:
        output: of the branch, before its second end. Requires a gradient.
        enter, leave: node types of the two ends. Output 0 of `enter` is the identity path, output 1
            the branch's input.
        owned: whether a leaf is a parameter of the block; None where that cannot be known.
        branch_input: what the first end gave, where it is known.
    """
    inside, sources = _walk(output, enter)
    if branch_input is not None and branch_input.requires_grad:
        sources |= _walk(branch_input, enter)[1]
    leaves = [node.variable for node in inside if not _inner(node)]
    stray = [leaf for leaf in leaves if owned and not owned(leaf)]
    past = [n for n in inside if n in sources or type(n) in (enter, leave)]
    if past or (stray and not _ancestors(sources).isdisjoint(filter(_inner, inside))):
        return IDENTITY
    # With no leaf of its own the model is another one, which `ResblockScaler.step` says.
    if stray and len(stray) < len(leaves):
        shape = tuple(stray[0].shape)
        return f"a tensor {shape} in it that needs a gradient and is no parameter of the block"
    return ADDS_INPUT if _adds_input(output, enter) else None


def has_input(output: Tensor, enter: type) -> bool:
    """Whether the branch's input needs a gradient: only then an identity path shows."""
    return bool(_walk(output, enter)[1])


def _inner(node: Node) -> bool:
    return not hasattr(node, "variable")


def _walk(output: Tensor, enter: type) -> tuple[set[Node], set[Node]]:
    """Nodes met without passing the first end, and those that made what the first end was given."""
    inside: set[Node] = set()
    sources: set[Node] = set()
    stack: list[tuple[Node, int]] = [(output.grad_fn, output.output_nr)]
    while stack:
        node, index = stack.pop()
        if node is None or node in inside:
            continue
        before = node.next_functions
        if type(node) is enter and index == 1:
            sources.add(before[0][0])
        else:
            inside.add(node)
            stack += before
    return inside, sources - {None}


def _ancestors(nodes: set[Node]) -> set[Node]:
    ancestors: set[Node] = set()
    stack: list[Node] = list(nodes)
    while stack:
        node = stack.pop()
        if node is not None and node not in ancestors:
            ancestors.add(node)
            stack += [before for before, _ in node.next_functions]
    return ancestors


def _adds_input(output: Tensor, enter: type) -> bool:
    """Whether sums and changes of form alone lie between the branch's input and its output."""
    stack: list[tuple[Node, int]] = [(output.grad_fn, output.output_nr)]
    seen: set[Node] = set()
    while stack:
        node, index = stack.pop()
        if type(node) is enter and index == 1:
            return True
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name() if _inner(node) else ""
        if name == "AddBackward0":
            stack += node.next_functions
        elif name in SUMS or name.rpartition(".")[2] in FORMS:
            stack.append(node.next_functions[0])
    return False
