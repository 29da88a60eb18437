"Deep learning, derived: tensors that remember where they came from"
__version__ = "0.1.0"

from .device import Device, all_devices, cpu, get_num_threads, set_num_threads
from .autograd import (Tensor, TensorTuple, detect_anomaly, enable_grad, find_topo_sort, fused_add_scalars, is_grad_enabled, lazy_mode,
    make_tuple, no_grad, tuple_get_item)
from .ops.shape import (broadcast_to, chunk, concat, diag, diagonal, dilate, flatten, flip, moveaxis, pad, permute, repeat_interleave,
    reshape, roll, split, squeeze, stack, summation, summation as sum, swapaxes, tile, transpose, tril, triu, unbind, undilate, unsqueeze)
from .ops.elementwise import (absolute, absolute as abs, add, add_scalar, arccos, arccosh, arcsin, arcsinh, arctan, arctan2, arctanh,
    astype, celu, clip, cos, cosh, divide, divide_scalar, elu, eq, erf, exp, exp2, expm1, floor, floor_divide, ceil, ge, gelu, gt,
    hardsigmoid, hardswish, hardtanh, isclose, isfinite, isinf, isnan, le, leaky_relu, log, log10, log1p, log2, logaddexp, logical_and,
    logical_not, logical_or, logical_xor, logsigmoid, lt, masked_fill, maximum, minimum, mish, mod, mul_scalar, multiply, ne, negate, power,
    power_scalar, prelu, relu, relu6, round, rsqrt, selu, sigmoid, sign, silu, sin, sinh, softplus, softsign, sqrt, square, subtract, tan, tanh,
    trunc, where)
from .ops.reduce import (all, any, argmax, argmin, argsort, cross_entropy, cumprod, cumsum, layer_norm, log_softmax, logsumexp, max, mean,
    median, min, norm, prod, softmax, sort, std, take_along_axis, topk, var)
from .ops.linalg import (bmm, cholesky, det, dot, einsum, inner, inverse, kron, linear, matmul, outer, slogdet, solve, tensordot, trace)
from .ops.index import (embedding, gather, index_put, index_select, masked_select, one_hot, scatter, scatter_add, take)
from .ops.conv import (adaptive_avg_pool1d, adaptive_avg_pool2d, avg_pool1d, avg_pool2d, conv1d, conv2d, conv_transpose1d, conv_transpose2d,
    fold, interpolate, max_pool1d, max_pool2d, unfold, upsample)
from .ops.fold import Function, op_map, op_reduce, op_zip
from .functional import checkpoint, elementwise_grad, grad, hessian, hvp, jacobian, jvp, value_and_grad, vjp

def __getattr__(name):
    "The compiler, and the ledger, are imported when they are first asked for"
    from importlib import import_module
    if name=='jit': from .compile import jit as value
    elif name=='program': from .lazy import program as value
    elif name=='operators': value = import_module('minima.operators')
    else: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return globals().setdefault(name, value)
