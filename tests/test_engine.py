"What the pages show small, at full size, and what needs processes or threads"
import gc, os, resource, subprocess, sys, threading
import numpy as np
import pytest
import minima as mi
from minima.autograd import LAZY, Tensor, find_topo_sort, using

@pytest.mark.parametrize('use', (True, False), ids=('differentiated', 'thrown away'))
def test_a_million_nodes(use):
    x = Tensor(np.float32(1))
    y = x
    for _ in range(1_000_000): y = y + x
    if use:
        y.backward()
        assert x.grad.item()==1_000_001
    del y # freed without recursion

def test_a_long_lazy_chain():
    with mi.lazy_mode():
        x = Tensor(1.)
        y = x
        for _ in range(100_000): y = y*0.5 + x
        y.backward()
    assert y.item()==2. and x.grad.item()==2.
    assert len(find_topo_sort([y]))==200_001

def test_modes_belong_to_threads():
    x,seen,inside,leave = Tensor([1.]),{},threading.Event(),threading.Event()
    def evaluate():
        with mi.no_grad(), mi.lazy_mode():
            inside.set(); leave.wait(10)
            y = x*x
            seen['evaluate'] = y.requires_grad, y.cached_data is None
    t = threading.Thread(target=evaluate); t.start()
    inside.wait(10)
    y = x*x
    seen['train'] = y.requires_grad, y.cached_data is None
    leave.set(); t.join()
    assert seen == {'evaluate': (False, True), 'train': (True, False)}

def test_modes_are_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), mi.no_grad(), mi.lazy_mode(): 1/0
    assert mi.is_grad_enabled() and (Tensor(1.)*2).cached_data is not None
    @mi.no_grad()
    def f(x): return x*2
    assert not f(Tensor(1.)).requires_grad and not f(Tensor(1.)).requires_grad

def test_a_failing_rule_restores_the_mode():
    class Bad(mi.operators.UnaryOp):
        def compute(self, x): return x
        def gradient(self, out_grad, node): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): Bad()(Tensor(1.)).backward()
    assert mi.is_grad_enabled()

def test_shared_adjoints_are_not_written_to():
    "a+b sends one tensor both ways; adding into it in place would corrupt the other"
    for create_graph in (False, True):
        a,b = Tensor(np.ones(3)),Tensor(np.ones(3))
        s = a + b
        y = s + a*2 + b*3 + s
        y.backward(np.ones(3), create_graph=create_graph)
        assert (a.grad.numpy()==4).all() and (b.grad.numpy()==5).all()
        assert create_graph or not np.shares_memory(a.grad.numpy(), b.grad.numpy())
    v = Tensor(np.ones(3), requires_grad=False)
    a,b = Tensor(np.ones(3)),Tensor(np.ones(3))
    (a + b).backward(v)
    a.grad.cached_data[:] = 7
    assert (v.numpy()==1).all() and (b.grad.numpy()==1).all()

def test_gradients_of_sums_own_their_memory():
    x = Tensor(np.ones((2,3)))
    x.sum().backward()
    with mi.no_grad(): x.grad *= 2
    assert (x.grad.numpy()==2).all()

def test_gradients_accumulate_and_keep_their_dtype():
    w = Tensor(np.ones((3,2), np.float32)); x = Tensor(np.ones((4,3), np.float32), requires_grad=False)
    for i in range(3): ((x@w).relu()*np.float64(2) + 1).mean().backward()
    assert w.grad.dtype==np.float32 and np.allclose(w.grad.numpy(), 3)

def test_memory_falls_during_backward():
    "Activations are let go as the walk passes: the peak of backward is little above that of forward"
    n,k = 1<<20,20 # 4 MiB each
    code = f"""
import resource, numpy as np, minima as mi
x = mi.Tensor(np.ones({n}, np.float32)); y = x
for _ in range({k}): y = y*y
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y.backward(np.ones({n}, np.float32))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024)
"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 8*4, f'{out} MiB above the forward pass'

def test_nothing_leaks_over_steps():
    w,x = Tensor(np.ones((64,64), np.float32)),Tensor(np.ones((64,64), np.float32), requires_grad=False)
    def step():
        (x@w).relu().sum().backward()
        with mi.no_grad(): w.data = w.data - 1e-6*w.grad
        w.grad = None
    step(); gc.collect(); before = len(gc.get_objects())
    for _ in range(100): step()
    gc.collect()
    assert len(gc.get_objects()) - before < 50

def test_anomaly_names_the_users_line():
    with mi.detect_anomaly(), np.errstate(all='ignore'):
        x = Tensor([0.,1.])
        with pytest.raises(FloatingPointError, match=r'(?s)Log\(\) gave.*input 0: \(2,\) float64 from 0 to 1.*test_engine.py:\d+: with pytest.*x\.log\(\)'): x.log()
        y = x**.5 # finite, with an infinite slope at 0
        with pytest.raises(FloatingPointError, match=r'(?s)in the gradient of PowerScalar.*test_engine.py:\d+: y = x\*\*\.5'): y.sum().backward()
