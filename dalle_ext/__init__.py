"""Kernels for training and sampling image-token transformers, each a torch operator."""

from __future__ import annotations

from dalle_ext._native import build_info
from dalle_ext._switch import use_reference
from dalle_ext._tensor_table import TensorTable, local_part
from dalle_ext.images import area_resize
from dalle_ext.ops.adam16 import AdamW16
from dalle_ext.ops.decode_attention import DecodeCache, decode_attention
from dalle_ext.ops.decode_layers import DecodeLayer, DecodeLayers
from dalle_ext.ops.formats import Packed, pack, pack_counted, sum_codes, unpack
from dalle_ext.ops.grad_scale import (
    GradientStats,
    ScaledGradient,
    scale_gradient,
    unscale_gradient,
    unscale_gradients_,
    update_scales_,
)
from dalle_ext.ops.gumbel_softmax import GumbelSoftmax, gumbel_softmax
from dalle_ext.ops.packed_linear import PackedLinear
from dalle_ext.ops.powersgd import (
    orthogonalize,
    powersgd_compress_,
    powersgd_decompress_,
    powersgd_project,
)
from dalle_ext.ops.sparse_attention import (
    AttentionPattern,
    sparse_attention,
    sparse_attention_qkvpacked,
)

__all__ = [
    "AdamW16",
    "AttentionPattern",
    "DecodeCache",
    "DecodeLayer",
    "DecodeLayers",
    "GradientStats",
    "GumbelSoftmax",
    "Packed",
    "PackedLinear",
    "ScaledGradient",
    "TensorTable",
    "area_resize",
    "build_info",
    "decode_attention",
    "gumbel_softmax",
    "local_part",
    "orthogonalize",
    "pack",
    "pack_counted",
    "powersgd_compress_",
    "powersgd_decompress_",
    "powersgd_project",
    "scale_gradient",
    "sparse_attention",
    "sparse_attention_qkvpacked",
    "sum_codes",
    "unpack",
    "unscale_gradient",
    "unscale_gradients_",
    "update_scales_",
    "use_reference",
]
