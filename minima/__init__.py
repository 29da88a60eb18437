"Deep learning, derived: tensors that remember where they came from"
__version__ = "0.1.0"

from .device import Device, all_devices, cpu, get_num_threads, set_num_threads
from .autograd import (Tensor, TensorTuple, detect_anomaly, enable_grad, find_topo_sort, fused_add_scalars, is_grad_enabled, lazy_mode,
    make_tuple, no_grad, tuple_get_item)
from .operators import (absolute, absolute as abs, add, add_scalar, adaptive_avg_pool1d, adaptive_avg_pool2d, all, any, arccos, arccosh, arcsin,
    arcsinh, arctan, arctan2, arctanh, argmax, argmin, argsort, astype, avg_pool1d, avg_pool2d, bmm, broadcast_to, celu, cholesky, chunk,
    clip, concat, conv1d, conv2d, conv_transpose1d, conv_transpose2d, cos, cosh, cross_entropy, cumprod, cumsum, det, diag, diagonal, dilate,
    divide, divide_scalar, dot, einsum, elu, embedding, eq, erf, exp, exp2, expm1, flatten, flip, floor, floor_divide, fold, ceil, gather, ge,
    gelu, gt, hardsigmoid, hardswish, hardtanh, index_put, index_select, inner, interpolate, inverse, isclose, isfinite, isinf, isnan, kron,
    layer_norm, le, leaky_relu, linear, log, log10, log1p, log2, log_softmax, logaddexp, logical_and, logical_not, logical_or, logical_xor,
    logsigmoid, logsumexp, lt, masked_fill, masked_select, matmul, max, max_pool1d, max_pool2d, maximum, mean, median, min, minimum, mish, mod,
    moveaxis, mul_scalar, multiply, ne, negate, norm, one_hot, outer, pad, permute, power, power_scalar, prelu, prod, relu, relu6,
    repeat_interleave, reshape, roll, rsqrt, scatter, scatter_add, selu, sigmoid, sign, silu, sin, sinh, slogdet, softmax, softplus, softsign,
    solve, sort, split, sqrt, square, squeeze, stack, std, subtract, summation, summation as sum, swapaxes, take, take_along_axis, tan, tanh,
    tensordot, tile, topk, trace, transpose, tril, triu, trunc, unbind, undilate, unfold, unsqueeze, upsample, var, where)
from .ops.elementwise import round
from .ops.fold import Function, op_map, op_reduce, op_zip
from .functional import checkpoint, elementwise_grad, grad, hessian, hvp, jacobian, jvp, value_and_grad, vjp

def __getattr__(name):
    "The compiler is imported when it is first asked for"
    if name=='jit': from .compile import jit as value
    elif name=='program': from .lazy import program as value
    else: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return globals().setdefault(name, value)
