"""AdamW16: its error messages, and the registration of its raw operator."""

from __future__ import annotations

import pytest
import torch

import dalle_ext

RAW = torch.ops.dalle_ext


def parameter(*shape, dtype=torch.float32, grad=True):
    param = torch.nn.Parameter(
        torch.ones(shape, dtype=dtype), requires_grad=dtype.is_floating_point
    )
    if grad:
        param.grad = torch.ones_like(param)
    return param


def make(**options):
    return dalle_ext.AdamW16([parameter(3)], **options)


def sparse_step():
    param = parameter(3)
    param.grad = torch.ones(3).to_sparse()
    dalle_ext.AdamW16([param]).step()


def other_model(*shapes):
    optimizer = dalle_ext.AdamW16([parameter(*shape) for shape in shapes])
    optimizer.step()
    make().load_state_dict(optimizer.state_dict())


BAD = {
    "AdamW16: params must hold a parameter, got none": lambda: dalle_ext.AdamW16([]),
    "AdamW16: params of a group must be on one device, got cpu and meta": lambda: dalle_ext.AdamW16(
        [torch.nn.Parameter(torch.ones(4, device=d)) for d in ("cpu", "meta")]
    ),
    "AdamW16: params must be float32, float16 or bfloat16, got torch.complex64": lambda: (
        dalle_ext.AdamW16([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    ),
    "AdamW16: params must be float32, float16 or bfloat16, got torch.int64": lambda: (
        dalle_ext.AdamW16([torch.ones(3, dtype=torch.int64)])
    ),
    "AdamW16: lr must be 0 or more and finite, got -1": lambda: make(lr=-1),
    "AdamW16: lr must be 0 or more and finite, got nan": lambda: make(lr=float("nan")),
    r"AdamW16: betas\[1\] must be 0 or more and below 1, got 1.0": lambda: make(betas=(0.9, 1.0)),
    "AdamW16: variance_clip must be above 0, got 0": lambda: make(variance_clip=0),
    "AdamW16: eps must be 0 or more and finite, got -1": lambda: make(eps=-1),
    "AdamW16: gradients must be dense, got torch.sparse_coo": sparse_step,
    "AdamW16: betas must be two numbers, got 0.9": lambda: make(betas=0.9),
    "AdamW16: weight_decay must be 0 or more and finite, got much": lambda: make(
        weight_decay="much"
    ),
    "AdamW16: seed must be an integer, got 1.5": lambda: make(seed=1.5),
    "AdamW16: params must hold a parameter, got none$": lambda: dalle_ext.AdamW16(torch.ones(3)),
    "AdamW16: params must be different tensors, got one of them twice": lambda: dalle_ext.AdamW16(
        [parameter(3)] * 2
    ),
    r"AdamW16: state must be of groups of \[1\] parameters, got \[2\]": lambda: other_model(
        (3,), (4,)
    ),
    r"AdamW16: state exp_avg of parameter 0 must be \(3,\) torch.float32, got \(4,\)": lambda: (
        other_model((4,))
    ),
    r"AdamW16: clip_factor must be one number, got \(2,\)": lambda: make().step(
        clip_factor=torch.ones(2)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gets_one_line(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


@pytest.mark.parametrize("group", [1, -1])
def test_groups_beyond_the_scales(group):
    optimizer = make()
    param = optimizer.param_groups[0]["params"][0]
    with pytest.raises(RuntimeError, match="AdamW16: groups must be 0 or more and below the"):
        optimizer.step(scales=torch.ones(1), groups={param: group})


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_that_are_none(scale):
    optimizer = make()
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    with pytest.raises(RuntimeError, match="AdamW16: scales must be positive and finite, got"):
        optimizer.step(scales=torch.tensor([scale]))
    assert torch.equal(before, optimizer.param_groups[0]["params"][0])


def test_the_raw_op_says_what_it_changes():
    schema = RAW._adam16_step_.default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["params", "means", "variances", "steps"]
