"Deep learning, derived: tensors that remember where they came from"
__version__ = "0.1.0"

from .device import Device, all_devices, cpu, get_num_threads, set_num_threads
from .autograd import Tensor, TensorTuple, detect_anomaly, enable_grad, find_topo_sort, is_grad_enabled, lazy_mode, no_grad
from .operators import (add, add_scalar, astype, broadcast_to, cross_entropy, divide, divide_scalar, eq, exp, ge, gt, le, linear, log,
    log_softmax, logsumexp, lt, make_tuple, matmul, mean, mul_scalar, multiply, ne, negate, permute, power, power_scalar, relu,
    reshape, softmax, subtract, summation, transpose, tuple_get_item)
