"The ledger, operator by operator: values and derivatives beside torch and differences, eager and lazy, special values, other libraries; and that it is complete"
import gc
import array_api_compat.torch, array_api_strict, torch
import numpy as np
import pytest
from minima.autograd import Tensor, lazy_mode
from minima.device import Device, add_device
from minima.operators import _axis_in, all_operators, elsewhere, ledger, operator_table, shape_marks

pytestmark = pytest.mark.filterwarnings('ignore:.*degrees of freedom is <= 0') # torch's, of variances of one number
add_device(Device('torch', array_api_compat.torch), torch.Tensor)
libraries = [('strict', lambda c: elsewhere(c, array_api_strict.asarray, np.asarray)), ('torch', lambda c: elsewhere(c, torch.tensor, lambda t: t.numpy()))]

@pytest.mark.parametrize('case', ledger, ids=lambda c: c.call)
def test_case(case):
    "All comparisons agree, and every mark is there or the row says why it is not"
    assert operator_table(elsewhere=libraries, progress=lambda _: [case]).failed == []

@pytest.mark.parametrize('case', ledger, ids=lambda c: c.call)
def test_shapes_that_hurt(case):
    "Empty, of length 1, equal sizes, and an axis counted from the end; or the row says why not"
    wanted = set('∅1=') | set('−'*_axis_in(case.call))
    assert wanted <= set(shape_marks(case)) or case.why.get('shapes')

def test_ledger_is_complete():
    assert {c.__name__ for c in all_operators()} == {c.name for c in ledger if isinstance(c.op, type)}

def first_inputs(case):
    rng = np.random.default_rng(0)
    return [s if isinstance(s, np.ndarray) else rng.uniform(case.low, case.high, s) for s in case.shapes[0]]

@pytest.mark.parametrize('case', ledger, ids=lambda c: c.call)
def test_no_cycle(case):
    "Nothing is left for the garbage collector: forward, backward and backward again free by reference counts alone"
    def work():
        xs = [Tensor(a) for a in first_inputs(case)]
        y = case.f(*xs)
        if not y.requires_grad: return
        y.backward(np.ones(y.shape), create_graph=True)
        grads = [x.grad for x in xs]
        for x in xs: x.grad = None
        for g in grads:
            if g is not None and g.requires_grad: g.backward(np.ones(g.shape), retain_graph=True)
        for x in xs: x.grad = None # a leaf's gradient of a gradient refers to the leaf: the one cycle a user can tie
    gc.disable(); gc.freeze() # of what is made from here on, what is left?
    try:
        work()
        assert not [o for o in gc.get_objects() if isinstance(o, Tensor) and o.op is not None]
    finally: gc.unfreeze(); gc.enable()

@pytest.mark.parametrize('case', ledger, ids=lambda c: c.call)
def test_operators_print_and_compare(case):
    with lazy_mode(): op = case.f(*(Tensor(a) for a in first_inputs(case))).op
    if op is not None: assert type(op).__name__ in repr(op) and op==op and op in [op]

@pytest.mark.parametrize('case', ledger, ids=lambda c: c.call)
def test_result_without_gradient_keeps_nothing(case):
    y = case.f(*(Tensor(a, requires_grad=False) for a in first_inputs(case)))
    assert y.op is None and y.inputs==() and not y.requires_grad

@pytest.mark.parametrize('case', ledger, ids=lambda c: c.call)
def test_lazy_shapes(case):
    "Shape and dtype are known before anything is computed, for all shapes of the ledger"
    rng = np.random.default_rng(0)
    for shapes in case.shapes:
        arrays = [s if isinstance(s, np.ndarray) else rng.uniform(case.low, case.high, s).astype(np.float32) for s in shapes]
        with lazy_mode(): y = case.f(*map(Tensor, arrays))
        if y.cached_data is not None: continue # the function returned an input
        shape,dtype = y.shape,y.dtype
        assert (shape,dtype)==(y.numpy().shape, y.numpy().dtype)
