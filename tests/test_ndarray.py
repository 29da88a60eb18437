"Our own array: views and loops of both makes beside NumPy on random strides, the ledger on the device, and the digits"
import multiprocessing, os, pickle, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from minima import operators
from minima.autograd import Tensor
from minima.data import mnist5k
from minima.device import cpu
from minima.ndarray import NDArray, NumbaArray, ndarray_device, places
from minima.operators import ledger, run_case
from minima.testing import Checked
from minima.train import loss_err, nn_epoch

root = Path(__file__).parent.parent
makes = ['python', 'numba']

# ---------------------------------------------------------------- views

@st.composite
def pairs(draw):
    "One view as NumPy has it, and as we have it: axes of 0 to 4 places, permuted, sliced, reversed, repeated"
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    a = np.random.default_rng(draw(st.integers(0, 9))).integers(-3, 4, shape).astype(np.float64)
    x = NDArray(a.reshape(-1), a.shape)
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(['permute', 'slice', 'flip', 'broadcast', 'reshape']))
        if kind=='permute': axes = draw(st.permutations(range(a.ndim))); a,x = a.transpose(axes),x.permute(axes)
        elif kind=='flip': a,x = np.flip(a),x.flip()
        elif kind=='broadcast': shape = (draw(st.integers(0, 3)), *a.shape); a,x = np.broadcast_to(a, shape),x.broadcast_to(shape)
        elif kind=='reshape': a,x = a.reshape(-1),x.reshape(-1)
        else:
            bound,step = st.none() | st.integers(-5, 5),st.sampled_from([None,1,2,3,-1,-2])
            index = draw(st.lists(st.builds(slice, bound, bound, step) | st.none() | st.just(...), max_size=a.ndim).filter(lambda i: i.count(...)<2))
            a,x = a[tuple(index)],x[tuple(index)]
    return a,x

def same(x, a, tol=0):
    assert (x.shape,x.dtype)==(a.shape,a.dtype)
    np.testing.assert_allclose(np.asarray(x), a, rtol=tol, atol=tol)

def steps(a): return [s//a.itemsize for n,s in zip(a.shape, a.strides) if n>1]

@settings(max_examples=300, deadline=None)
@given(pairs())
def test_views_are_numpys(pair):
    "Numbers and strides, and each way between the libraries"
    a,x = pair
    same(x, a)
    if a.size and np.shares_memory(x.numpy(), x.buffer): assert steps(x.numpy())==[s for n,s in zip(x.shape, x.strides) if n>1]
    same(x.compact(), a); same(x.copy(), a)
    assert x.compact().buffer.tolist()==a.ravel().tolist()==[x.buffer[p] for p in places(x)]
    shared = NDArray.space.asarray(a)
    same(shared, a)
    if a.size and a.flags.writeable: assert np.shares_memory(shared.numpy(), a) and steps(a)==[s for n,s in zip(shared.shape, shared.strides) if n>1]

# ---------------------------------------------------------------- loops

def on(make, x): return ndarray_device(make).xp.asarray(x)

def agree(f, *arrays, tol=1e-14):
    "Both makes and NumPy"
    with np.errstate(all='ignore'): theirs = f(np, *[np.asarray(x) for x in arrays])
    for make in makes: same(f(ndarray_device(make).xp, *[on(make, x) for x in arrays]), theirs, tol)

@settings(max_examples=100, deadline=None)
@given(pairs(), st.integers(0, 9), st.data())
def test_loops_agree(pair, seed, data):
    a,x = pair
    rng = np.random.default_rng(seed)
    y = NDArray(rng.normal(size=[n if rng.random()<.6 else 1 for n in a.shape[rng.integers(0, a.ndim+1):]]))
    agree(lambda xp,x,y: x + y, x, y)
    agree(lambda xp,x,y: x/y - 2*x, x, y)
    agree(lambda xp,x,y: xp.where(x<y, x, xp.exp(y)), x, y)
    agree(lambda xp,x: xp.astype(x, np.int64)//2, x)
    axes = data.draw(st.none() | st.lists(st.integers(0, max(a.ndim-1, 0)), max_size=a.ndim, unique=True).map(tuple))
    for name in 'sum prod all'.split(): agree(lambda xp,x: getattr(xp, name)(x, axis=axes, keepdims=seed%2==0), x)
    if a.size: agree(lambda xp,x: xp.max(x, axis=axes), x)
    if a.ndim: agree(lambda xp,x,y: xp.matmul(x, xp.permute_dims(xp.broadcast_to(y, x.shape), (*range(a.ndim-2), *range(a.ndim)[-2:][::-1]))), x, y)

@settings(max_examples=100, deadline=None)
@given(pairs(), st.integers(0, 9), st.sampled_from(makes))
def test_writing(pair, seed, make):
    "In place and into slices; source and target may overlap"
    a,x = np.array(pair[0]),on(make, pair[1].copy())
    rng = np.random.default_rng(seed)
    y = rng.normal(size=[n if rng.random()<.6 else 1 for n in a.shape[rng.integers(0, a.ndim+1):]])
    a[...],x[...] = a*y,on(make, y)*x
    if a.ndim:
        a[1:],x[1:] = a[:-1].copy(),x[:-1]
        a[::2] += seed; x[::2] += seed
        a *= a[::-1].copy(); x *= x[::-1]
    same(x, a, 1e-14)
    for shape in ((7,*a.shape), (*a.shape,7)):
        with pytest.raises(ValueError): x[...] = on(make, np.zeros(shape))

@pytest.mark.parametrize('make,dtype', [*(('python',t) for t in ('float32', 'int32', 'uint8', 'bool')), ('numba','float32'), ('numba','bool')])
def test_dtypes(make, dtype):
    a = np.array([[0,1,2],[3,1,0]]).astype(dtype)
    x = on(make, a)
    for f in (lambda x: x + x, lambda x: x*2.5, lambda x: x<1, lambda x: x.sum(0), lambda x: x.max(), lambda x: x@x.T): same(f(x), np.asarray(f(a)), 1e-6)

def test_large_arrays_on_threads():
    "Parts of the work of every loop, in every layout"
    kernels,rng = ndarray_device('numba').xp.array.kernels,np.random.default_rng(0)
    threads,kernels.threads = kernels.threads,3
    try:
        a,b = rng.random((1030,1031)),rng.random((1030,1031))
        for f in (lambda x,y: x + y, lambda x,y: x.T + y.T, lambda x,y: x[::-1,::2] + y[:,:1], lambda x,y: x.sum(0), lambda x,y: x.sum(1), lambda x,y: x.sum(), lambda x,y: x[:300]@y.T[:,:200]):
            same(f(on('numba', a), on('numba', b)), np.asarray(f(a, b)), 1e-9)
    finally: kernels.threads = threads

def test_what_numba_lacks():
    "A function that Numba does not compile runs by the Python loops"
    same(np.heaviside(on('numba', [-1.,0.,2.]), on('numba', .5)), np.array([0,.5,1]))

# ---------------------------------------------------------------- the device

def chapter(case): return (case.op if isinstance(case.op, type) else getattr(operators, case.op)).__module__.rpartition('.')[2]
rows = [c for c in ledger if chapter(c) in ('shape', 'elementwise', 'reduce', 'linalg')]

def test_rows():
    assert len(rows)>150 and {chapter(c) for c in rows}=={'shape', 'elementwise', 'reduce', 'linalg'}

@pytest.mark.parametrize('case', rows, ids=lambda c: c.call)
def test_ledger_python(case):
    "Values, gradients and second gradients, eager and lazy, beside torch; all of them arrays of this device"
    assert isinstance(run_case(case, device=ndarray_device('python'), dtypes=case.dtypes[:1]), Checked)

@pytest.mark.parametrize('case', rows, ids=lambda c: c.call)
def test_ledger_numba(case):
    "The same, in float64, with finite differences"
    assert run_case(case, device=ndarray_device('numba'), dtypes=case.dtypes[-1:]).value < 1e-13

def losses(device, X, y, hidden, batch, lr=.2):
    "Mean loss of each batch before its step, by the training loop of the book"
    rng,found = np.random.default_rng(0),[]
    W1,W2 = (Tensor(rng.normal(0, (2/m)**.5, (m,n)), device=device) for m,n in ((X.shape[1],hidden), (hidden,10)))
    for i in range(0, len(X), batch):
        x,t = X[i:i+batch],y[i:i+batch]
        found.append(loss_err((Tensor(x, device=device, requires_grad=False)@W1).relu()@W2, t)[0])
        nn_epoch(x, t, W1, W2, lr, batch)
    assert W1.device==W1.grad.device==device and type(W1.cached_data) is device.xp.array if device!=cpu() else True
    return np.array(found)

@pytest.mark.parametrize('make', makes)
def test_the_two_layer_network(make):
    "The same losses as on NumPy: all 4,000 digits on compiled loops, some coarse ones on Python's"
    X,y = mnist5k()
    order = np.random.default_rng(0).permutation(len(X))
    X,y = X[order].astype(np.float64),y[order]
    if make=='python': X,y = X[:60].reshape(-1,28,28)[:,::4,::4].reshape(-1,49),y[:60]
    hidden,batch = (100,100) if make=='numba' else (8,10)
    ours,theirs = (losses(d, X, y, hidden, batch) for d in (ndarray_device(make), cpu()))
    assert abs(ours-theirs).max() < 1e-12
    if make=='numba': assert theirs[-1] < .5*theirs[0]

@pytest.mark.parametrize('make', makes)
def test_pickle(make):
    x = on(make, np.arange(12.).reshape(3,4)).T[1:]
    y = pickle.loads(pickle.dumps(x))
    assert type(y) is type(x) and len(y.buffer)==9
    same(y, np.asarray(x))
    t = pickle.loads(pickle.dumps(Tensor(x)))
    assert t.device==ndarray_device(make)

# ---------------------------------------------------------------- Numba, processes and places

def work(): return float((on('numba', np.ones((1200,1200)))*2).sum())

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
@pytest.mark.filterwarnings('ignore:This process')
def test_forked_processes():
    "A child of a process whose threads have worked starts its own"
    kernels = ndarray_device('numba').xp.array.kernels
    threads,kernels.threads = kernels.threads,2
    try:
        assert work()==2*1200*1200 and os.getpid() in kernels.pool
        with multiprocessing.get_context('fork').Pool(2) as pool: assert [r.get(60) for r in [pool.apply_async(work) for _ in range(4)]]==[2*1200*1200]*4
        assert work()==2*1200*1200
    finally: kernels.threads = threads

def python(code, **env):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(root)} | env)

def test_without_numba():
    "The Python loops are there, and the error names the extra"
    res = python("""
import sys; sys.modules['numba'] = None
from minima.ndarray import ndarray_device
assert ndarray_device() is ndarray_device('python')
try: ndarray_device('numba')
except ImportError as e: print(e)""")
    assert "pip install 'minima-dl[numba]'" in res.stdout, res.stderr

def test_numba_is_imported_where_used():
    res = python("import sys, minima.ndarray; minima.ndarray.ndarray_device('python'); assert 'numba' not in sys.modules")
    assert res.returncode==0, res.stderr

def test_nowhere_to_keep_machine_code():
    res = python("""
import numba.core.caching as c
c.CacheImpl._locator_classes = [] # what is left where nothing can be written
from minima.ndarray import ndarray_device
x = ndarray_device('numba').array([1.,2.])
assert (x + x).tolist()==[2.,4.] and ndarray_device('numba').xp.array.kernels.loops""")
    assert res.returncode==0, res.stderr

def test_machine_code_is_kept(tmp_path):
    code = """
from minima.ndarray import ndarray_device
x = ndarray_device('numba').array([1.,2.])
assert (x + x).tolist()==[2.,4.]
loop, = [l for (make,*_),l in ndarray_device('numba').xp.array.kernels.loops.items() if make.__name__=='_zip_loop']
print(sum(loop.stats.cache_hits.values()))"""
    hits = [python(code, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert [h.stdout.strip() for h in hits]==['0','1'], hits[0].stderr+hits[1].stderr
