"""What is known of ops, by their neutral keys, besides their rules: one table a property."""

from __future__ import annotations

import functools

import torch

# --- what a call gives -------------------------------------------------------------------------

# Calls that tell about a tensor without reading its values.
METADATA = frozenset(
    {
        "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "dtype", "device",
        "layout", "requires_grad", "requires_grad_", "is_cuda", "is_cpu", "is_meta", "is_mps",
        "is_xpu", "is_sparse", "is_quantized", "is_nested", "is_leaf", "is_contiguous", "stride",
        "is_floating_point", "is_complex", "is_inference", "is_same_size", "element_size",
        "itemsize", "nbytes", "storage_offset", "get_device", "data_ptr", "grad_fn", "names",
        "has_names", "len", "is_signed", "is_conj", "is_neg", "name", "grad", "is_tensor",
        "hash", "is_sparse_csr", "is_mkldnn", "is_vulkan", "is_ipu", "is_xla", "is_hpu", "is_mtia",
        "is_maia", "is_ort", "retains_grad", "output_nr", "_version", "type", "dim_order",
        "sym_size", "set_grad", "is_coalesced", "is_pinned", "is_shared", "result_type", "can_cast",
    }
)  # fmt: skip

# Calls that give one new tensor, whose shape, strides and type follow from those of the tensors
# that they are given: what they gave once, they give again.
GIVES_ALIKE = frozenset(
    {
        "add", "sub", "mul", "div", "neg", "pow", "square", "sqrt", "rsqrt", "exp", "log", "abs",
        "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus",
        "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "sin", "cos", "softmax",
        "log_softmax", "linear", "matmul", "mm", "bmm", "addmm", "conv1d", "conv2d", "conv3d",
        "layer_norm", "group_norm", "batch_norm", "rms_norm", "mean", "sum", "cat", "stack",
        "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "embedding", "maximum", "minimum",
    }
)  # fmt: skip

# Calls that take values out of a tensor and fail where it has none.
TAKES_VALUES = frozenset(
    {"numpy", "array", "tolist", "dlpack", "contains", "format", "repr", "str"}
)  # fmt: skip

# Calls that read a single yes or no into Python.
READS_A_BOOL = frozenset({"item", "bool", "is_nonzero"})

# Calls that read no value of the tensors that they are given.
READS_SHAPES_ALONE = frozenset({"zeros_like", "ones_like", "new_zeros", "new_ones"})

# Calls whose result is zero everywhere.
GIVES_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})

# Calls that may read memory beside the entries of the tensor that they are given.
READS_MEMORY = frozenset({"as_strided"})

# Results that hold no values yet, and random numbers that ATen does not know to be random.
_WITHOUT_VALUES = frozenset(
    {
        "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided",
        "empty_quantized", "gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d",
        "fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices",
        "dropout1d", "dropout2d", "dropout3d", "multi_head_attention_forward", "rand", "normal",
    }
)  # fmt: skip


@functools.cache
def gives_the_same_values(key: str) -> bool:
    """Whether a call of the op on the same tensors gives the same values each time."""
    packet = getattr(torch.ops.aten, key, None) if key.isidentifier() else None
    overloads = [getattr(packet, name) for name in packet.overloads()] if packet is not None else []
    random = any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)
    return key not in _WITHOUT_VALUES and not random


# --- what a call writes into -------------------------------------------------------------------

# Functions that may write in place by a positional flag and give something else for zero.
MAY_WRITE_BY_A_FLAG = frozenset(
    {"hardsigmoid", "hardtanh", "threshold", "alpha_dropout", "feature_alpha_dropout"}
)

# Functions that write running statistics.
WRITES_STATISTICS = frozenset(
    {"batch_norm", "instance_norm", "batch_norm_flat", "instance_norm_flat"}
)

# Ops that in place change how memory is looked at, not what it holds.
CHANGES_THE_VIEW = frozenset({"squeeze", "unsqueeze", "transpose", "t", "detach"})

# --- which arguments do not matter -------------------------------------------------------------

# Products and quotients by a number are the same to a rule whatever the number is, except zero.
ANY_NUMBER = frozenset({"mul", "div"})

# Arguments that say whether the model is training: the rules of these ops hold in either case.
TRAINING_ARGUMENTS = {
    **dict.fromkeys(
        (
            "dropout",
            "dropout1d",
            "dropout2d",
            "dropout3d",
            "alpha_dropout",
            "feature_alpha_dropout",
        ),
        ("p", "training"),
    ),
    "scaled_dot_product_attention": ("dropout_p",),
    "batch_norm": ("training", "momentum"),
    "instance_norm": ("use_input_stats", "momentum"),
    "rrelu": ("training",),
    "multi_head_attention_forward": ("training",),
}

# --- families ----------------------------------------------------------------------------------

NORMALIZATIONS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})

# Calls that sum products of two tensors' entries along an axis: an activation's and a weight's.
CONTRACTIONS = frozenset(
    {
        "linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
        "conv_transpose2d", "conv_transpose3d", "matmul", "rmatmul", "mm", "bmm", "mv", "addmm",
        "addmv", "baddbmm", "addbmm", "einsum", "multi_head_attention_forward",
    }
)  # fmt: skip

# Calls that give entries of their tensor, in another place or type, or those of a part of it.
GIVES_ITS_ENTRIES = frozenset(
    {
        "to", "type_as", "float", "contiguous", "alias", "detach", "clone", "view", "reshape",
        "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "getitem",
        "slice", "select",
    }
)  # fmt: skip
