"""Random programs of up to 12 operators beside torch: value, gradient, gradient of the gradient, eager and lazy.

300 of them in the test suite; `python tests/test_random.py 100000` runs as many as it is told and reports how many passed."""
import sys
from collections import Counter
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings, strategies as st
from minima.autograd import LAZY, Tensor, using
from minima.testing import _compare, _derivatives, _to_numpy, _torch_derivatives

# An operator of a program: how many tensors it takes, and the call, written once for both libraries where they agree.
# `k` is a random integer, for axes and the like. A call that does not fit the shapes is left out of the program.
def nn(name, *args): return lambda a,k: getattr(a if isinstance(a, Tensor) else torch.nn.functional, name)(*(() if isinstance(a, Tensor) else (a,)), *args)
unary = {
    'sin': lambda a,k: a.sin(), 'tanh': lambda a,k: a.tanh(), 'sigmoid': lambda a,k: a.sigmoid(), 'abs': lambda a,k: abs(a), 'sqrt': lambda a,k: (a*a + .5).sqrt(), 'erf': lambda a,k: a.erf(), 'clip': lambda a,k: a.clip(-.8, .9), 'log1p': lambda a,k: (a*a).log1p(),
    'cumsum': lambda a,k: a.cumsum(axis(a, k)), 'prod': lambda a,k: a.prod(axis(a, k)), 'sort': lambda a,k: a.sort(axis(a, k), bool(k%2))[0], 'flip': lambda a,k: a.flip(axis(a, k)), 'roll': lambda a,k: a.roll(k, axis(a, k)), 'tril': lambda a,k: a.tril(k%3-1),
    'squeeze': lambda a,k: a.squeeze(axis(a, k)), 'flatten': lambda a,k: a.flatten(), 'unbind': lambda a,k: a.unbind(axis(a, k))[0], 'diagonal': lambda a,k: a.diagonal(k%3-1), 'tile': lambda a,k: a.tile((2,)),
    'neg': lambda a,k: -a, 'exp': lambda a,k: (a*.5).exp(), 'log': lambda a,k: (a*a + .5).log(), 'relu': lambda a,k: a.relu(),
    'add 1.5': lambda a,k: a + 1.5, '2 sub': lambda a,k: 2 - a, 'mul .7': lambda a,k: a*.7, 'div 3': lambda a,k: a/3, 'rdiv': lambda a,k: 1/(a*a + 1),
    'pow 2': lambda a,k: a**2, 'pow 3': lambda a,k: a**3, 'pow -1.5': lambda a,k: (a*a + 1)**-1.5,
    'sum': lambda a,k: a.sum(axis(a, k)), 'sum all': lambda a,k: a.sum(), 'sum keep': lambda a,k: a.sum(axis(a, k), True), 'mean': lambda a,k: a.mean(axis(a, k)),
    'logsumexp': lambda a,k: a.logsumexp(axis(a, k)), 'softmax': lambda a,k: a.softmax(axis(a, k)), 'log_softmax': lambda a,k: a.log_softmax(axis(a, k)),
    'reshape': lambda a,k: a.reshape((-1,)), 'unsqueeze': lambda a,k: a.reshape((*a.shape[:k%(a.ndim+1)], 1, *a.shape[k%(a.ndim+1):])),
    'transpose': lambda a,k: a.transpose(axis(a, k), axis(a, k//3)), 'permute': lambda a,k: a.permute(tuple(sorted(range(a.ndim), key=lambda i: (i*k)%7))),
    'broadcast': lambda a,k: a.broadcast_to((2, *a.shape)), 'index': lambda a,k: a[k%len(a)], 'slice': lambda a,k: a[k%2::2], 'last': lambda a,k: a[...,-1:],
    'gather': lambda a,k: a[[0,-1,0]], 'cos': lambda a,k: a.cos(), 'sinh': lambda a,k: a.sinh(), 'cosh': lambda a,k: a.cosh(), 'tan': lambda a,k: (a.tanh()).tan(),
    'arcsin': lambda a,k: (a.tanh()*.9).arcsin(), 'arccos': lambda a,k: (a.tanh()*.9).arccos(), 'arctan': lambda a,k: a.arctan(), 'arcsinh': lambda a,k: a.arcsinh(), 'arccosh': lambda a,k: (a*a + 1.5).arccosh(), 'arctanh': lambda a,k: (a.tanh()*.9).arctanh(),
    'exp2': lambda a,k: (a*.5).exp2(), 'expm1': lambda a,k: (a*.5).expm1(), 'log2': lambda a,k: (a*a + .5).log2(), 'log10': lambda a,k: (a*a + .5).log10(), 'rsqrt': lambda a,k: (a*a + .5).rsqrt(), 'square': lambda a,k: a.square(),
    'var': lambda a,k: a.var(axis(a, k)), 'norm': lambda a,k: a.norm(2, axis(a, k)), 'cumprod': lambda a,k: a.cumprod(axis(a, k)), 'topk': lambda a,k: a.topk(1, axis(a, k))[0], 'triu': lambda a,k: a.triu(k%3-1), 'swapaxes': lambda a,k: a.swapaxes(axis(a, k), axis(a, k//3)),
    'chunk': lambda a,k: a.chunk(2, axis(a, k))[-1], 'split': lambda a,k: a.split(2, axis(a, k))[0], 'repeat': lambda a,k: a.repeat_interleave(2, axis(a, k)), 'masked_fill': lambda a,k: a.masked_fill(a>.2, .3), 'mod': lambda a,k: a % .7, 'floor': lambda a,k: a.floor() + a,
    'diag_embed': lambda a,k: a.diag_embed(), 'moveaxis': lambda a,k: a.moveaxis(axis(a, k), axis(a, k//3)), 'none': lambda a,k: a[None,...], 'mask': lambda a,k: a[[True]+[k%2==0]*(len(a)-1)],
    'gelu': nn('gelu'), 'silu': nn('silu'), 'mish': nn('mish'), 'elu': nn('elu', .7), 'selu': nn('selu'), 'celu': nn('celu', .5), 'softplus': nn('softplus'), 'leaky_relu': nn('leaky_relu', .1), 'hardtanh': nn('hardtanh'), 'logsigmoid': nn('logsigmoid'), 'softsign': nn('softsign'), 'relu6': nn('relu6'), 'hardswish': nn('hardswish'),
}
binary = {
    'maximum': lambda a,b,k: a.maximum(b), 'minimum': lambda a,b,k: a.minimum(b), 'arctan2': lambda a,b,k: a.arctan2(b*b + .5), 'logaddexp': lambda a,b,k: a.logaddexp(b), 'where': lambda a,b,k: a.where(b>0, b),
    'add': lambda a,b,k: a + b, 'sub': lambda a,b,k: a - b, 'mul': lambda a,b,k: a*b, 'div': lambda a,b,k: a/(b*b + .5), 'pow': lambda a,b,k: (a*a + .5)**(b*.3),
    'matmul': lambda a,b,k: a@b, 'matmul T': lambda a,b,k: a@b.transpose(-1,-2), 'gate': lambda a,b,k: a*(b>0),
    'inner': lambda a,b,k: a.inner(b), 'outer': lambda a,b,k: a.outer(b), 'kron': lambda a,b,k: a.kron(b), 'dot': lambda a,b,k: a.dot(b), 'clip between': lambda a,b,k: a.clip(b-.5, b+.5), 'bmm': lambda a,b,k: a.bmm(b),
}
def axis(a, k):
    if not a.ndim: raise IndexError('no axis')
    return k%(2*a.ndim) - a.ndim

ops = [(1,n,f) for n,f in unary.items()] + [(2,n,f) for n,f in binary.items()]
sizes = [(), (1,), (2,), (3,), (2,3), (3,3), (1,3), (3,1), (2,1,3), (2,3,3), (3,2), (0,3), (2,2,2)]
shapes = st.sampled_from(sizes)
leaves = st.lists(st.tuples(shapes, st.sampled_from(['float64','float64','float32'])), min_size=1, max_size=3)
steps = st.lists(st.tuples(st.integers(0, len(ops)-1), st.integers(0,5), st.integers(0,5), st.integers(0,11)), min_size=1, max_size=12)

def fits(error): return isinstance(error, (ValueError, IndexError, RuntimeError, TypeError, ZeroDivisionError))

def run(steps, xs):
    "The program on tensors of torch: its value, and the steps that fit"
    pool,kept = list(xs),[]
    for op,i,j,k in steps:
        n,name,f = ops[op]
        # later results first, so that programs are deep
        args = [pool[-1-i%len(pool)], pool[-1-j%len(pool)]][:n]
        try: y = f(*args, k)
        except Exception as e:
            if not fits(e): raise
            continue
        if y.numel() > 500 or not torch.isfinite(y).all() or (y.numel() and y.abs().max() > 1e3): continue
        pool.append(y); kept.append((op,i,j,k))
    return kept

def replay(steps, xs):
    pool = list(xs)
    for op,i,j,k in steps:
        n,name,f = ops[op]
        pool.append(f(*[pool[-1-i%len(pool)], pool[-1-j%len(pool)]][:n], k))
    return pool[-1]

counts = Counter()

def check(leaves, steps, seed):
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(rng.uniform(-1.5, 1.5, s)).astype(d) for s,d in leaves]
    kept = run(steps, [torch.tensor(a) for a in arrays])
    if not kept: counts['empty'] += 1; return
    us = [np.asarray(rng.standard_normal(a.shape)).astype(a.dtype) for a in arrays]
    def v(y): return np.asarray(np.random.default_rng(seed+1).standard_normal(tuple(y.shape)), str(y.dtype).split('.')[-1])
    f = lambda *xs: replay(kept, xs)
    try: y,grads,grads2 = _torch_derivatives(torch, f, arrays, v, us)
    except RuntimeError: counts['torch gives up'] += 1; return # as behind a product of an empty float32 and a float64
    program = '; '.join(f'{ops[op][1]}({i},{j},{k})'[:40] for op,i,j,k in kept)
    tol = 1e-8 if all(a.dtype==np.float64 for a in arrays) else 2e-3
    for level in (0,LAZY):
        with using(on=level): y_,grads_,grads2_ = _derivatives(f, arrays, v, us)
        where = f'\n{program}\non {leaves}, seed {seed}'
        assert str(y.dtype)==f'torch.{y_.dtype}', f'dtype {y_.dtype} for {y.dtype}{where}'
        _compare(_to_numpy(y_), _to_numpy(y), tol, f'value{where}', 'torch')
        for what,ours,theirs in (('gradient',grads_,grads),('gradient of the gradient',grads2_,grads2)):
            for k,(g,h) in enumerate(zip(ours or (), theirs or ())):
                shape = arrays[k].shape if k<len(arrays) else tuple(y.shape)
                g,h = (np.zeros(shape) if x is None else _to_numpy(x) for x in (g,h))
                if not np.isfinite(h).all() or (h.size and abs(h).max() > 1e8): counts['too large'] += 1; return
                _compare(g, h, tol*(1 if what=='gradient' else 10), f'{what} {k}{where}', 'torch')
    counts['passed'] += 1
    counts[f'{len(kept)} operators'] += 1

@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(leaves, steps, st.integers(0, 2**32-1))
def test_random_programs(leaves, steps, seed): check(leaves, steps, seed)

def main(n):
    from tqdm import tqdm
    bar = tqdm(total=n)
    @settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(leaves, steps, st.integers(0, 2**32-1))
    def many(leaves, steps, seed): bar.update(); check(leaves, steps, seed)
    many()
    bar.close()
    print(dict(counts))

if __name__=='__main__': main(int(sys.argv[1]) if len(sys.argv)>1 else 1000)
