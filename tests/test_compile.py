"""Compiled beside eager: the ledger, random programs, training steps, and all that a user can do to a compiled function.

`python tests/test_compile.py 1000` checks as many random programs, and a tenth as many random trainings, with both back-ends, and reports."""
import os, sys, warnings
from collections import Counter
import numpy as np
import pytest
from minima.autograd import Tensor
from minima.compile import compiled_marks, jit
from minima.operators import ledger
from minima.testing import _compare, _derivatives
import test_random

pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning:numpy', 'ignore:.*degrees of freedom is <= 0')
both = pytest.mark.parametrize('backend', ['numpy','c'])
tolerances = {'float64':1e-12, 'float32':1e-5}

@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    "What is compiled here is compiled now"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('MINIMA_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield

def backends(f): return {e.backend for e in f.programs.values()}

# ---------------------------------------------------------------- every operator

@pytest.fixture(scope='module')
def mark(): return compiled_marks(ledger)

@pytest.mark.parametrize('case', ledger, ids=lambda c: c.call)
def test_case(case, mark): assert mark(case)=='✓'

# ---------------------------------------------------------------- random programs

class Random:
    "A random program of tests/test_random.py: value, gradients, gradients of the gradients"
    def __init__(self, seed):
        rng,self.seed = np.random.default_rng(seed),seed
        while True:
            leaves = [(test_random.sizes[rng.integers(len(test_random.sizes))], ('float64','float64','float32')[rng.integers(3)]) for _ in range(rng.integers(1, 4))]
            steps  = [(rng.integers(len(test_random.ops)), *rng.integers(0, 6, 2), rng.integers(12)) for _ in range(rng.integers(1, 13))]
            self.arrays = [np.asarray(rng.uniform(-1.5, 1.5, s)).astype(d) for s,d in leaves]
            self.steps  = test_random.run([tuple(map(int, s)) for s in steps], [test_random.torch.tensor(a) for a in self.arrays])
            if self.steps: break
        self.us = [np.asarray(rng.standard_normal(a.shape)).astype(a.dtype) for a in self.arrays]
        self.tol = max(tolerances[a.dtype.name] for a in self.arrays)
    def v(self, y): return np.asarray(np.random.default_rng(self.seed+1).standard_normal(y.shape), y.dtype)
    def __call__(self, arrays):
        y,*grads = _derivatives(lambda *xs: test_random.replay(self.steps, xs), arrays, self.v, self.us)
        return [t.detach() for t in (y, *(g for gs in grads for g in gs or () if g is not None))]
    def moved(self, k):
        "Inputs, each number half a unit in the last place away"
        rng = np.random.default_rng(k)
        return [a*(1 + rng.choice([-1,1], a.shape)*np.finfo(a.dtype).eps).astype(a.dtype) for a in self.arrays]
    def compare(self, ours, theirs):
        assert [(y.shape,y.dtype) for y in ours]==[(y.shape,y.dtype) for y in theirs], self
        counts['programs'] += 1
        try:
            for k,(a,b) in enumerate(zip(ours, theirs)): _compare(a.numpy(), b.numpy(), self.tol, f'{self}\nresult {k}', 'eager')
            return
        except AssertionError as e: error = e
        with np.errstate(all='ignore'): near = [self(self.moved(k)) for k in range(8)] # what rounding the inputs does
        for k,(a,b,*others) in enumerate(zip(ours, theirs, *near)):
            b,d = b.numpy(),np.max([np.abs(o.numpy()-b) for o in others], 0)
            far = np.abs(a.numpy()-b) > self.tol*max(1, np.abs(b, where=np.isfinite(b), out=np.zeros_like(b)).max(initial=0)) + 100*d.max(initial=0)
            if far.any() or (np.isnan(a.numpy())!=np.isnan(b)).any() and not np.isnan(d).any(): raise error
        counts['badly conditioned'] += 1
    def __repr__(self): return f"Random({self.seed}): {'; '.join(f'{test_random.ops[op][1]}({i},{j},{k})' for op,i,j,k in self.steps)} of {[(a.shape,a.dtype.name) for a in self.arrays]}"

counts = Counter()

def check_programs(seeds, backend):
    "Several programs as one function"
    ps = [Random(s) for s in seeds]
    arrays = [p.arrays for p in ps]
    f = jit(lambda arrays: [p(a) for p,a in zip(ps, arrays)], backend=backend, threads=1)
    f(arrays) # the second run finds what the first has left in memory
    with np.errstate(all='ignore'): eager = [p(a) for p,a in zip(ps, arrays)]
    for p,ours,theirs in zip(ps, f(arrays), eager): p.compare(ours, theirs)
    assert backends(f)=={backend}

@pytest.mark.parametrize('start', range(0, 200, 20))
def test_random_programs_in_numpy(start): check_programs(range(start, start+20), 'numpy')

@pytest.mark.parametrize('start', range(0, 100, 20))
def test_random_programs_in_c(start): check_programs(range(start, start+20), 'c')

# ---------------------------------------------------------------- many

def main(n):
    from tqdm import tqdm
    failed = []
    for start in tqdm(range(0, n, 20)):
        for backend in ('numpy','c'):
            try: check_programs(range(10**6+start, 10**6+start+20), backend)
            except Exception:
                for s in range(10**6+start, 10**6+start+20):
                    try: check_programs([s], backend)
                    except Exception as e: failed.append(s); print(backend, type(e).__name__, str(e)[:1500], flush=True)
    print(dict(counts), 'failed:', failed)

if __name__=='__main__': main(int(sys.argv[1]) if len(sys.argv)>1 else 1000)
