"""Compiled beside eager: the ledger, random programs, training steps, and all that a user can do to a compiled function.

`python tests/test_compile.py 1000` checks as many random programs, and a tenth as many random trainings, with both back-ends, and reports; `python tests/test_compile.py digits` reads digits for ten epochs."""
import copy, ctypes, itertools, math, os, pickle, subprocess, sys, threading, time, tracemalloc, warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple
import numpy as np
import pytest
from minima import nn
from minima.autograd import Tensor, Value, mode, no_grad
from minima.compile import build, compiled_marks, jit, products_source
from minima.data import mnist5k
from minima.init import manual_seed, rand, randb, randn
from minima.lazy import TraceError
from minima.operators import ledger
from minima.optim import *
from minima.sequence import GRU, LSTM, RNN, length_mask
from minima.transformer import GPT, GPTConfig, MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer
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
            b = b.numpy()
            d = np.max([np.abs(o.numpy()-b) for o in others], 0)
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

# ---------------------------------------------------------------- random trainings

def pick(rng, *options): return options[rng.integers(len(options))]
activations = nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.PReLU, nn.LeakyReLU, nn.Softplus, nn.ELU, nn.Mish, nn.Hardswish, nn.Sigmoid
def activation(rng, dtype): return (c := pick(rng, *activations))(**dict(dtype=dtype) if c is nn.PReLU else {})

def mlp(rng, dtype):
    norm = pick(rng, nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm, lambda n, dtype: nn.GroupNorm(2, n, dtype=dtype), lambda n, dtype: nn.BatchNorm1d(n, momentum=None, affine=False, dtype=dtype))
    model = nn.Sequential(nn.Linear(5, 8, bias=False, dtype=dtype), norm(8, dtype=dtype), activation(rng, dtype), nn.Residual(nn.Linear(8, 8, dtype=dtype)), activation(rng, dtype), nn.Linear(8, 4, dtype=dtype))
    return model, lambda rng, n: [Tensor(rng.standard_normal((n,5)).astype(dtype), requires_grad=False)], lambda n: (n,4)

def conv2d(rng, dtype):
    pool = pick(rng, nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.Conv2d(4, 4, 2, 2, groups=2, dtype=dtype))
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False, dtype=dtype), nn.BatchNorm2d(4, dtype=dtype), activation(rng, dtype), pool,
        pick(rng, nn.Identity(), nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, dtype=dtype), nn.Upsample(scale_factor=2)), activation(rng, dtype), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4, dtype=dtype))
    return model, lambda rng, n: [Tensor(rng.standard_normal((n,2,6,6)).astype(dtype), requires_grad=False)], lambda n: (n,4)

def conv1d(rng, dtype):
    model = nn.Sequential(nn.Conv1d(3, 6, 3, padding=2, dilation=2, groups=3, dtype=dtype), activation(rng, dtype), pick(rng, nn.MaxPool1d(2), nn.AvgPool1d(3, 1, 1)), nn.GroupNorm(3, 6, dtype=dtype), nn.Conv1d(6, 4, 2, dtype=dtype))
    return model, lambda rng, n: [Tensor(rng.standard_normal((n,3,8)).astype(dtype), requires_grad=False)], lambda n: (n,4,*model(Tensor(np.zeros((1,3,8), dtype))).shape[2:])

class Words(nn.Module):
    "Embeddings, what reads them, and scores"
    def __init__(self, rng, dtype):
        self.table = nn.Embedding(9, 6, padding_idx=pick(rng, None, 0), dtype=dtype)
        self.kind = pick(rng, 'bag','rnn','attention','encoder','decoder')
        if self.kind=='rnn': self.reader = pick(rng, RNN, LSTM, GRU)(6, 6, batch_first=True, bidirectional=(two := bool(rng.integers(2))), num_layers=pick(rng, 1, 2), dtype=dtype)
        if self.kind=='attention': self.reader = MultiheadAttention(6, 2, bias=False, batch_first=True, dtype=dtype)
        if self.kind in ('encoder','decoder'): self.reader = (TransformerEncoderLayer if self.kind=='encoder' else TransformerDecoderLayer)(6, 2, 12, 0., pick(rng, 'relu', 'gelu'), batch_first=True, norm_first=bool(rng.integers(2)), bias=False, dtype=dtype)
        self.last = nn.Linear(12 if self.kind=='rnn' and two else 6, 4, dtype=dtype)
    def forward(self, ids, lengths):
        x,hidden = self.table(ids),~length_mask(lengths, ids.shape[1])
        if self.kind=='rnn': x = self.reader(x, lengths=lengths)[0]
        if self.kind=='attention': x = self.reader(x, x, x, key_padding_mask=hidden)[0]
        if self.kind=='encoder': x = self.reader(x, src_key_padding_mask=hidden)
        if self.kind=='decoder': x = self.reader(x, x, memory_key_padding_mask=hidden, tgt_is_causal=True)
        return self.last(x.mean(1))

def words(rng, dtype): return Words(rng, dtype), lambda rng, n: [rng.integers(0, 9, (n,5)), Tensor(rng.integers(1, 6, n), requires_grad=False)], lambda n: (n,4)

class Text(nn.Module):
    def __init__(self, *args, **kw): self.gpt = GPT(*args, **kw)
    def forward(self, ids): return self.gpt(ids).transpose(1, 2)
def gpt(rng, dtype):
    model = Text(GPTConfig(4, 6, 1, 2, 8, bias=False, tie=bool(rng.integers(2)), positions=pick(rng, 'learned','sinusoidal','rotary')), dtype=dtype)
    return model, lambda rng, n: [rng.integers(0, 4, (n,6))], lambda n: (n,4,6)

def loss_of(rng, dtype):
    "A loss of scores (n, 4, …), and a draw of its targets"
    weight,smooth = pick(rng, None, np.array([1.,.5,2.,1.], dtype)),pick(rng, 0., .1)
    def classes(rng, shape): return rng.integers(0, 4, (shape[0], *shape[2:]))
    def some(rng, shape): t = classes(rng, shape); t[rng.random(t.shape) < .3] = 3; return t
    def distributions(rng, shape): p = rng.random(shape).astype(dtype); return p/p.sum(1, keepdims=True)
    def numbers(rng, shape): return rng.standard_normal(shape).astype(dtype)
    def shares(rng, shape): return rng.random(shape).astype(dtype)
    return pick(rng,
        (lambda z, t: nn.cross_entropy(z, t, weight, label_smoothing=smooth), classes), (lambda z, t: nn.cross_entropy(z, t, weight, ignore_index=3, label_smoothing=smooth), some),
        (lambda z, t: nn.cross_entropy(z, t, weight, ignore_index=3, reduction='sum')/8, some), (lambda z, t: nn.cross_entropy(z, t, reduction='none').mean(), classes),
        (lambda z, t: nn.cross_entropy(z, t, weight), distributions), (lambda z, t: nn.nll_loss(z.log_softmax(1), t, weight, ignore_index=3), some),
        (nn.mse_loss, numbers), (nn.huber_loss, numbers), (nn.smooth_l1_loss, numbers), (nn.l1_loss, numbers), (nn.binary_cross_entropy_with_logits, shares),
        (lambda z, t: nn.binary_cross_entropy(z.sigmoid(), t), shares), (lambda z, t: nn.kl_div(z.log_softmax(1), t), distributions), (lambda z, t: nn.hinge_loss(z, t), lambda rng, shape: rng.choice([-1,1], shape).astype(dtype)))

optimisers = [(SGD, {}), (SGD, dict(momentum=.9, nesterov=True)), (SGD, dict(momentum=.9, dampening=.1, weight_decay=.01)), (SGD, dict(maximize=True)), (Adagrad, dict(eps=1e-2, lr_decay=.1)),
    (RMSprop, dict(eps=1e-2)), (RMSprop, dict(eps=1e-2, momentum=.9, centered=True)), (Adadelta, dict(eps=1e-2)), (Adam, dict(eps=1e-2)), (Adam, dict(eps=1e-2, amsgrad=True, weight_decay=.01)), (AdamW, dict(eps=1e-2)),
    (NAdam, dict(eps=1e-2)), (RAdam, dict(eps=1e-2)), (Lion, dict(weight_decay=.1)), (Muon, {})]
schedules = [None, lambda o: StepLR(o, 1, .7), lambda o: CosineAnnealingLR(o, 5), lambda o: ExponentialLR(o, .9), lambda o: OneCycleLR(o, .1, total_steps=30, cycle_momentum=o.defaults.keys() >= {'betas'})]

class Training:
    "A model, an optimiser, and what happens to them"
    def __init__(self, seed, wrap):
        rng = np.random.default_rng(seed)
        manual_seed(seed)
        opt,options = pick(rng, *optimisers)
        self.dtype = 'float64' if opt in (Lion, Muon) else pick(rng, 'float64', 'float64', 'float32') # a sign, and a fifth power, of a rounding error
        self.model,self.inputs,self.shape = pick(rng, mlp, conv2d, conv1d, words, words, gpt)(rng, self.dtype)
        self.loss,self.targets = loss_of(rng, self.dtype)
        ps = [p for p in self.model.parameters() if p.ndim==2 or opt is not Muon]
        cut = rng.integers(1, len(ps)) if len(ps)>1 else 0
        self.opt = opt([dict(params=ps[:cut], lr=.02, weight_decay=.1), dict(params=ps[cut:])] if cut and rng.integers(2) else ps, lr=.05, **options)
        self.clip,self.ema = pick(rng, None, .1, 1., 'values'),ModelEMA(self.model, .9)
        self.schedule = f(self.opt) if (f := pick(rng, *schedules)) else None
        self.clear = pick(rng, 'inside','outside','zeros')
        self.name = f'Training({seed}): {type(self.model).__name__} {getattr(self.model, "kind", "")} {self.opt!r} {self.dtype} clip {self.clip} clear {self.clear}'
        self.eager,self.step,self.gather,self.apply = self.train,wrap(self.train),wrap(self.backward),wrap(self.move)
        self.saved = None
    def backward(self, xs, t, share=1.):
        loss = self.loss(self.model(*xs), t)*share
        loss.backward()
        return loss
    def move(self):
        norm = clip_grad_value_(self.model.parameters(), .05) if self.clip=='values' else clip_grad_norm_(self.model.parameters(), self.clip) if self.clip else None
        self.opt.step()
        return norm
    def train(self, xs, t):
        if self.clear=='inside': self.opt.zero_grad()
        loss = self.backward(xs, t)
        return loss,self.move()
    def do(self, rng, what):
        "One thing that happens; what came out"
        n,out = pick(rng, 6, 6, 6, 3),None
        xs,model = self.inputs(rng, n),self.model
        t,first = self.targets(rng, self.shape(n)),next(model.parameters())
        if what in ('step','eager step'):
            if self.clear!='inside': self.opt.zero_grad(self.clear=='outside')
            out = (self.step if what=='step' else self.eager)(xs, t)
            if self.schedule: self.schedule.step()
            self.ema.update()
        if what=='accumulate': self.opt.zero_grad(); out = [self.gather(xs, t, .5), self.gather(xs, t, .5), self.apply()]
        if what=='evaluate': model.eval(); out = self.gather(xs, t); model.train()
        if what=='freeze': first.requires_grad = not first.requires_grad; first.grad = None
        if what=='save': self.saved = {k:np.array(v.numpy()) for k,v in model.state_dict().items()},self.opt.state_dict(),self.ema.state_dict()
        if what=='load' and self.saved: model.load_state_dict(self.saved[0]); self.opt.load_state_dict(self.saved[1]); self.ema.load_state_dict(self.saved[2])
        if what=='rate': self.opt.param_groups[0]['lr'] *= .5
        if what=='average':
            with self.ema.swapped(): out = self.gather(xs, t)
        return out,dict(model.state_dict()),{n:p.grad for n,p in model.named_parameters()},self.opt.state_dict(),self.ema.state_dict()

def leaves(tree):
    if isinstance(tree, dict): tree = [x for k,v in tree.items() for x in (k,v)]
    if isinstance(tree, (list,tuple)):
        for t in tree: yield from leaves(t)
    else: yield tree.numpy() if isinstance(tree, Tensor) else tree

def same(ours, theirs, tol, where):
    ours,theirs = list(leaves(ours)),list(leaves(theirs))
    assert len(ours)==len(theirs), where
    for a,b in zip(ours, theirs):
        if isinstance(b, (np.ndarray,np.generic)): assert a.dtype==b.dtype.newbyteorder('='), where; _compare(a, b, tol, where, 'eager')
        else: assert type(a) is type(b) and a==b, f'{where}: {a} compiled, {b} eager'

def check_training(seed, backend, n=8):
    rng,made = np.random.default_rng(seed+1),[]
    def wrap(f): made.append(jit(f, backend=backend, threads=1)); return made[-1]
    ours,theirs = Training(seed, wrap),Training(seed, lambda f: f)
    things = ['step','step',*rng.choice(['step','step','step','eager step','accumulate','evaluate','freeze','save','load','rate','average'], n-3),'step']
    for k,what in enumerate(things):
        events = [t.do(np.random.default_rng([seed, k]), what) for t in (ours,theirs)]
        same(*events, tolerances[ours.dtype]*10, f'{ours.name}\nafter {things[:k+1]}')
    counts['trainings'] += 1
    counts[type(ours.opt).__name__] += 1
    counts[getattr(ours.model, 'kind', type(ours.model).__name__)] += 1
    assert {b for f in made for b in backends(f)}=={backend}

@pytest.mark.parametrize('seed', range(40))
def test_random_trainings_in_numpy(seed): check_training(seed, 'numpy')

@pytest.mark.parametrize('seed', range(100, 108))
def test_random_trainings_in_c(seed): check_training(seed, 'c', 5)

# ---------------------------------------------------------------- NaN and infinity

def special_work(values):
    "For each row of the ledger, inputs with zeros, infinities and NaN: many, or one"
    for case in ledger:
        shapes = max(case.shapes, key=lambda ss: sum(int(np.prod(s)) for s in ss if isinstance(s, tuple)))
        free,rng = [k for k,s in enumerate(shapes) if isinstance(s, tuple)],np.random.default_rng(0)
        if 'NaN' in case.why: continue
        for value in values:
            arrays = [np.asarray(rng.uniform(case.low, case.high, s)) if k in free else s for k,s in enumerate(shapes)]
            if value is None: arrays = [rng.choice([0.,-0.,np.inf,-np.inf,np.nan,1.,-1.5], a.shape) if k in free else a for k,a in enumerate(arrays)]
            elif free and arrays[free[0]].size: arrays[free[0]].flat[rng.integers(arrays[free[0]].size)] = value
            yield case,arrays

def value_and_gradients(case, arrays):
    xs = [Tensor(a) for a in arrays]
    y = case.f(*xs)
    if y.requires_grad: y.backward(np.ones(y.shape))
    return [t.detach() for t in (y, *(x.grad for x in xs if x.grad is not None))]

def outcome(case, arrays):
    try: return value_and_gradients(case, arrays)
    except Exception: return None

@both
def test_nan_and_infinity(backend):
    "Where eager code has them, and nowhere else"
    with np.errstate(all='ignore'): work = [(c, a, e) for c,a in special_work([None, 0., -0., np.inf, -np.inf, np.nan][:6 if backend=='numpy' else 1]) if (e := outcome(c, a)) is not None]
    for i in range(0, len(work), 60):
        part = work[i:i+150]
        f = jit(lambda inputs: [value_and_gradients(c, a) for (c,*_),a in zip(part, inputs)], backend=backend, threads=1)
        for (c,arrays,eager),ours in zip(part, f([a for _,a,_ in part])):
            for k,(a,b) in enumerate(zip(ours, eager)): _compare(a.numpy(), b.numpy(), 1e-12, f'{c.call} of {arrays}, result {k}', 'eager')

@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_fast_hides_no_nan_in_a_loss(value):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    losses = [lambda z, t: nn.cross_entropy(z, t), lambda z, t: nn.mse_loss(z.softmax(-1), np.eye(3, dtype='float32')[:2]), lambda z, t: z.exp().sum().log(), lambda z, t: nn.binary_cross_entropy_with_logits(z, np.eye(3, dtype='float32')[:2]), lambda z, t: z.max()]
    x = np.ones((2,4), 'float32'); x[1,2] = value
    x,t = Tensor(x, requires_grad=False),np.array([0,1])
    def run(x): return [l(model(x), t) for l in losses]
    with np.errstate(all='ignore'): eager = run(x)
    for ours,theirs in zip(jit(run, backend='c', fast=True)(x), eager): assert np.isnan(ours.item()) and np.isnan(theirs.item())

# ---------------------------------------------------------------- what cannot be traced

x3 = Tensor([1.,-2.,3.])
values = [
    lambda x: x if x.sum() > 0 else -x, lambda x: x*x.sum().item(), lambda x: Tensor(x.numpy()), lambda x: x*float(x[0]), lambda x: x*int(x[0]), lambda x: x[int(x[0])], lambda x: x*bool(x[0]),
    lambda x: print(x), lambda x: repr(x), lambda x: f'{x}', lambda x: np.asarray(x), lambda x: x.tolist(), lambda x: len(x.masked_select(x>0))*x, lambda x: x[x>0], lambda x: sorted(x), lambda x: max(x),
    lambda x: x*math.sqrt(x[0]), lambda x: 1. in x, lambda x: [x for _ in range(int(x[0]))], lambda x: -x if (x==x).all() else x, lambda x: (1,2,3)[x.argmax()], lambda x: ((x*x).sum().backward(), x.grad.sum().item()),
    lambda x: copy.deepcopy(x), lambda x: pickle.dumps(x), lambda x: x.data.numpy(), lambda x: math.isnan(x[0]), lambda x: x if not x.sum() else -x]

@pytest.mark.parametrize('f', values, ids=range(len(values)))
def test_what_numbers_would_decide(f):
    with pytest.raises(TraceError, match=r'known only when the program runs, at .*test_compile.py:\d+'): jit(f, backend='numpy')(x3)
    assert mode.trace is None and Tensor.grad is Value.grad and x3.grad is None
    x = Tensor([1.,2.])
    (x*x).sum().backward() # eager code as before
    assert x.grad.tolist()==[2,4]

def test_arrays_want_to_be_tensors():
    for f in (lambda a: a.mean(), lambda a: a.ravel(), lambda a: a.flags):
        with pytest.raises(AttributeError, match='make it a tensor'): jit(f, backend='numpy')(np.ones(3))
    for f in (lambda a: a[a>1], lambda a: a[np.array([0,1])]):
        with pytest.raises(TraceError, match='index of arrays, at .*test_compile'): jit(f, backend='numpy')(np.ones(3))
    with pytest.raises(TraceError): jit(lambda a: np.concatenate([a, a]), backend='numpy')(np.ones(3))

def test_what_happens_once():
    "What counts in Python refuses to be compiled"
    model = nn.Linear(2, 2)
    opt = SGD(model.parameters())
    for f,*args in ((LBFGS(model.parameters()).step, lambda: None), (StepLR(opt, 1).step,), (ModelEMA(model).update,)):
        with pytest.raises(RuntimeError, match='jit: '): jit(lambda: f(*args), backend='numpy')()

@both
def test_errors_of_numbers_come_when_it_runs(backend):
    "As in eager code; weights, statistics and state are as before"
    manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 2))
    opt = Adam(model.parameters())
    def step(ids, t):
        loss = nn.cross_entropy(model(ids), t)
        opt.zero_grad(); loss.backward(); opt.step()
        return loss
    f,ids,t = jit(step, backend=backend, threads=1),np.array([[0,1],[2,3],[1,1]]),np.array([0,1,0])
    f(ids, t)
    def state(): return list(leaves((dict(model.state_dict()), opt.state_dict())))
    before = copy.deepcopy(state())
    for bad,error in (((ids, t+1), ValueError), ((ids-1, t), IndexError), ((ids+1, t), IndexError), ((ids, t-1), ValueError)):
        with pytest.raises(error): f(*bad)
        same(state(), before, 0, 'after an error')
    f(ids, t)
    assert f.traced==1 and any((a!=b).any() for a,b in zip(state(), before) if isinstance(a, np.ndarray))
    for bad,error in (((ids, t+1), ValueError), ((ids-1, t), IndexError)):
        with pytest.raises(error): step(*bad)

@both
def test_an_exception_leaves_all_as_it_was(backend):
    manual_seed(0)
    model,x,fail = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)),Tensor(np.eye(3, dtype='float32')),[True]
    opt = Adam(model.parameters(), lr=.1)
    def step(x):
        loss = model(x).exp().sum()
        opt.zero_grad(); loss.backward(); opt.step()
        x += 1
        if fail[0]: raise KeyError('mine')
        return loss
    model(x).sum().backward()
    ps = [*model.parameters(), x]
    before = copy.deepcopy(dict(model.state_dict())),[p.grad for p in ps],[p.cached_data for p in ps],mode.level
    f = jit(lambda x: no_grad_on(x, step), backend=backend)
    for _ in range(2):
        with pytest.raises(KeyError, match='mine'): f(x)
        same(dict(model.state_dict()), before[0], 0, 'after an exception')
        assert not opt.state_dict()['state'] and all(p.grad is g and p.cached_data is a for p,g,a in zip(ps, *before[1:3])) and (mode.level, mode.trace)==(before[3], None) and np.array_equal(x.numpy(), np.eye(3))
    fail[0] = False
    twin = copy.deepcopy(model)
    assert abs(f(x).item() - twin(Tensor(np.eye(3, dtype='float32'))).exp().sum().item()) < 1e-4 and np.array_equal(x.numpy(), np.eye(3)+1)

def no_grad_on(x, f):
    "`f` may write to x"
    x.requires_grad = False
    try: return f(x)
    finally: x.requires_grad = True

# ---------------------------------------------------------------- chance

@both
def test_random_numbers_are_eagers(backend):
    x,drop = Tensor(np.ones((4,5), 'float32')),nn.Dropout(.4)
    def grad(x):
        x.grad = None
        (drop(x)*drop(x)*x).sum().backward()
        return x.grad
    def drawn(x): return drop(x), randn(3)*rand(3) + x.sum(), randb(7), nn.dropout(x, .5, generator=7), grad(x)
    def run(f, seed): manual_seed(seed); return [[t.numpy().copy() for t in f(x)] for _ in range(3)]
    f = jit(drawn, backend=backend, threads=1)
    eager,ours,again,other = run(drawn, 3),run(f, 3),run(f, 3),run(f, 4)
    same(ours, eager, 1e-6, 'random numbers'); same(again, eager, 1e-6, 'random numbers')
    for k in (0,1,4): assert len({a[k].tobytes() for a in ours+other})==6, k
    drop.eval(); same(f(x)[0], x, 0, 'evaluation')
    g = jit(lambda x, g: nn.dropout(x, .5, generator=g), backend=backend, threads=1) # a generator as an argument
    a,b = np.random.default_rng(5),np.random.default_rng(5)
    for _ in range(3): same(g(x, a), nn.dropout(x, .5, generator=b), 0, 'generator')

# ---------------------------------------------------------------- arguments and results

arguments = dict(float16=np.arange(6).reshape(2,3).astype('float16'), int8=np.arange(6, dtype='int8'), uint8=np.arange(6, dtype='uint8'), int64=np.arange(-3, 3), bool=np.array([True,False]), big=np.arange(3, dtype='>f8'),
    fortran=np.asfortranarray(np.arange(6.).reshape(2,3)), backwards=np.arange(12.)[::-2], transposed=np.arange(24.).reshape(2,3,4).T, zero_d=np.array(2.), number=np.float32(3), empty=np.zeros((0,3)), broadcast=np.broadcast_to(np.arange(3.), (4,3)), empty_inside=np.zeros((2,0,3)), long=np.arange(3, dtype=np.longdouble))

@both
def test_arguments_of_all_kinds(backend):
    "Arrays as they come; they are not changed, and results are new arrays"
    def f(a): t = Tensor(a, requires_grad=False); return t*1, t+t, t>2, t.sum(), t.sum(-1) if t.ndim else t, t.astype('float32'), t.reshape(-1)
    g = jit(f, backend=backend, threads=1)
    for name,a in arguments.items():
        before = a.copy()
        for _ in range(2):
            ours = g(a)
            same(ours, f(a), 1e-12, name)
            arrays = [t.numpy() for t in ours]
            assert backends(g)=={backend} and np.array_equal(a, before) and not any(np.shares_memory(b, c) for k,b in enumerate(arrays) for c in [np.asarray(a), *arrays[:k]]), name
        kept = [b.copy() for b in arrays]
        g(a+a)
        for b,c in zip(arrays, kept): assert np.array_equal(b, c), name # the next call leaves them alone

@both
def test_structures(backend):
    def f(a, *rest, k=None, **kw): return {'s': a+rest[0]['u'][1], 'l': [k*2, kw['z'], None, 3, 'x'], 't': (a, Point(a+1, k))}
    a,b = Tensor([1.,2.]),Tensor([3.,4.])
    g = jit(f, backend=backend, threads=1)
    for x,y in ((a,b), (b,a), (a,a), (a,b)): same(g(x, {'u':(1,y)}, k=y, z=x), f(x, {'u':(1,y)}, k=y, z=x), 0, 'structures')
    assert g(a, {'u':(1,b)}, k=b, z=a)['t'][0] is a and isinstance(g(a, {'u':(1,b)}, k=b, z=a)['t'][1], Point) and g.traced==2
    g = jit(lambda it: sum(t*t for t in it), backend=backend, threads=1)
    assert [g(t for t in (a,b)).tolist() for _ in range(2)]==[[10,20]]*2
    with pytest.raises(TypeError, match='hashable, got .*set'): g({1,2})

class Point(NamedTuple):
    x:Tensor
    y:Tensor

class Scaled:
    def __init__(self, k): self.k = Tensor([k,k])
    @jit
    def f(self, x): return x*self.k

@both
def test_functions_of_all_kinds(backend):
    a = Tensor([1.,2.])
    inner = jit(lambda x: x*x, backend=backend)
    assert jit(lambda x: inner(x) + inner(x+1), backend=backend)(a).tolist()==[5,13]
    m,n = Scaled(2.),Scaled(3.)
    assert [k.f(a).tolist() for k in (m,n,m)]==[[2,4],[3,6],[2,4]]
    assert jit(partial(lambda x, k: x*k, k=3.), backend=backend)(a).tolist()==[3,6]

def test_variables_around():
    "Bound to something else, they are noticed"
    def make():
        w,k,a = Tensor([1.,1.]),2.,np.ones(2)
        def put(**kw):
            nonlocal w,k,a
            w,k,a = kw.get('w', w),kw.get('k', k),kw.get('a', a)
        return (lambda x: x*w*k + Tensor(a)),put
    f,put = make()
    g,x = jit(f, backend='numpy'),Tensor([1.,2.])
    for change in ({}, dict(w=Tensor([5.,5.])), dict(k=3.), dict(a=np.zeros(2)), dict(w=Tensor([0.,1.]), k=1.)):
        put(**change)
        assert g(x).tolist()==f(x).tolist()
    n = g.traced
    g(x); assert g.traced==n==5

# ---------------------------------------------------------------- shared memory

@both
def test_same_tensor_twice(backend):
    def f(a, b): (a*b).sum().backward(); return a.grad
    x,y = Tensor([1.,2.]),Tensor([3.,4.])
    g = jit(f, backend=backend, threads=1)
    assert g(x, x).tolist()==[2,4] and x.grad.tolist()==[2,4]
    x.grad = None
    assert g(x, y).tolist()==[3,4] and (x.grad.tolist(), y.grad.tolist())==([3,4], [1,2])

@both
def test_writes_to_shared_memory(backend):
    "They are what eager code does, or an error"
    def f(a, b): a += 1; return b*2
    memory = np.arange(4.)
    a,b = (Tensor.make_const(m) for m in (memory[:3], memory[1:]))
    g = jit(f, backend=backend, threads=1)
    for args in ((a, b), (a, Tensor.make_const(memory)), (memory[:2], memory[1:])):
        with pytest.raises(TraceError, match='shares memory'): g(*args)
    assert memory.tolist()==[0,1,2,3]
    assert g(memory[:2], memory[2:]).tolist()==[4,6] and memory.tolist()==[1,2,2,3] # apart
    memory.flags.writeable = False
    with pytest.raises(ValueError, match='read-only'): g(memory[:2], np.ones(2))
    frozen = Tensor.make_const(memory)
    with pytest.raises(ValueError, match='read-only'): jit(lambda: frozen.__iadd__(1), backend=backend)()
    w = Tensor([1.,2.,3.])
    def update(x):
        w.grad = None
        (w*x).sum().backward()
        with no_grad(): w.__isub__(w.grad)
        return w*x
    h = jit(update, backend=backend, threads=1)
    h(Tensor([1.,1.,1.]))
    with pytest.raises(TraceError, match='shares memory'): h(Tensor.make_const(w.numpy()[::-1]))

def test_products_of_small_matrices():
    "Every rest that the blocks leave, with A transposed, with B transposed, and added to what is there"
    lib,i,p,rng = build(products_source, fast=True),ctypes.c_int64,ctypes.c_void_p,np.random.default_rng(0)
    for m,n,k in itertools.product((1,2,3,4,5,6,7,13), (1,3,4,7,8,9,15,16,17,25,33), (1,2,7,8,9,31,64)):
        b,c = rng.standard_normal((k,n), dtype='f4'),rng.standard_normal((m,n), dtype='f4')
        for a,add in itertools.product((rng.standard_normal((m,k), dtype='f4'), rng.standard_normal((k,m), dtype='f4').T), (0,1)):
            wanted,d = a.astype('f8')@b + (c if add else 0),c.copy()
            lib.by_rows(i(m), i(n), i(k), p(a.ctypes.data), i(a.strides[0]//4), i(a.strides[1]//4), p(b.ctypes.data), i(n), p(d.ctypes.data), i(n), add)
            np.testing.assert_allclose(d, wanted, 1e-4, 1e-4)
            if a.flags.f_contiguous and not a.flags.c_contiguous: continue
            bt,d = np.ascontiguousarray(b.T),c.copy()
            lib.by_dots(i(m), i(n), i(k), p(a.ctypes.data), i(k), i(1), p(bt.ctypes.data), i(k), p(d.ctypes.data), i(n), add)
            np.testing.assert_allclose(d, wanted, 1e-4, 1e-4)

# ---------------------------------------------------------------- threads and processes

@both
def test_many_threads_call(backend):
    w,wrong = Tensor(np.eye(3)),[]
    f = jit(lambda a: (a@w).exp().sum(0), backend=backend)
    def work(i):
        for k in range(30):
            a = np.full((3,3), (i+k/30)/5)
            if not np.allclose(f(Tensor(a)).numpy(), np.exp(a).sum(0), 1e-13): wrong.append((i,k))
    def eager():
        for k in range(100):
            v = Tensor([1.,2.]); (v*v).sum().backward()
            if v.grad.tolist()!=[2,4]: wrong.append(v)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)] + [threading.Thread(target=eager)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong and len(f.programs)==1

def step_of(model, opt, backend, threads=1):
    def step(x, t):
        loss = nn.cross_entropy(model(x), t)
        opt.zero_grad(); loss.backward(); opt.step()
        return loss
    return jit(step, backend=backend, threads=threads) if backend else step

def large_mlp(): manual_seed(0); return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.BatchNorm1d(512), nn.Linear(512, 10))
def lenet():
    manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
def batch(*shape): rng = np.random.default_rng(0); return Tensor(rng.standard_normal(shape).astype('float32'), requires_grad=False),rng.integers(0, 10, shape[0])

@both
def test_threads_and_fork_agree(backend):
    "Two threads have the numbers of one, in every run, and in a child"
    x,t = batch(512, 64)
    def run(threads):
        model = large_mlp()
        f = step_of(model, Adam(model.parameters()), backend, threads)
        for _ in range(3): f(x, t)
        return f,[p.numpy().copy() for p in model.parameters()]
    (_,one),(f,two),(_,again) = run(1),run(2),run(2)
    for a,b,c in zip(one, two, again): _compare(b, a, 1e-5, 'two threads', 'one'); assert np.array_equal(b, c)
    if not hasattr(os, 'fork'): return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        child = os.fork()
    if not child: os._exit(0 if np.isfinite(f(x, t).item()) and jit(lambda x: x*2, backend=backend)(x) is not None else 1)
    deadline = time.time()+60
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.time()<deadline: time.sleep(.05)
    if not done[0]: os.kill(child, 9); os.waitpid(child, 0)
    assert done[0] and done[1]==0

# ---------------------------------------------------------------- memory

def peak(f):
    f()
    tracemalloc.start()
    try: f(); return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()

@pytest.mark.parametrize('make,shape', [(large_mlp, (512,64)), (lenet, (32,1,28,28))], ids=['mlp','lenet'])
@both
def test_memory(make, shape, backend):
    "All that a compiled step needs is less than eager's peak, and `explain` says it"
    model = make()
    opt,data = SGD(model.parameters(), lr=.01),batch(*shape)
    eager = peak(lambda: step_of(model, opt, None)(*data))
    f = step_of(model, opt, backend)
    f(*data)
    e, = f.programs.values()
    arena = e.memory.nbytes if backend=='c' else e.plan.size
    assert arena + (0 if (make, backend)==(lenet, 'numpy') else peak(lambda: f(*data))) < eager # NumPy's convolution makes an array of all windows in either case
    assert f'memory: {e.plan.size:,} bytes' in f.explain() and f'runs in {backend}' in f.explain()

# ---------------------------------------------------------------- the compiler and its cache

def python(code, **env):
    "A process of its own"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get('PYTHONPATH', '')])} | env)
    return r.returncode,r.stdout.strip(),r.stderr

twice = """
import warnings; warnings.simplefilter('always')
from minima import Tensor, jit
f = jit(lambda x: x*2 + {k}, backend={backend!r})
print(f(Tensor([1.,2.])).tolist(), *{{e.backend for e in f.programs.values()}})
"""
def use(k=0, backend='c', more='', **env): return python(twice.format(k=k, backend=backend) + more, OPENBLAS_NUM_THREADS='1', **env) # one thread: the pool of threads is a library too

def test_cache(tmp_path):
    cache = tmp_path/'a'/'b'
    def here(k=0, **env): return use(k, **{'MINIMA_CACHE': str(cache)} | env)
    assert here()==(0, '[2.0, 4.0] c', '')
    lib, = cache.glob('*.so')
    assert cache.stat().st_mode & 0o777==0o700
    made = lib.stat().st_mtime_ns
    assert here()[:2]==(0, '[2.0, 4.0] c') and lib.stat().st_mtime_ns==made                  # used again
    for bad in (b'', lib.read_bytes()[:1000], lib.read_bytes()[:-3000], b'\x7fELF'+bytes(5000), lib.read_bytes()[:3000]+b'x'*100+lib.read_bytes()[3100:]):
        lib.write_bytes(bad)
        assert here()[:2]==(0, '[2.0, 4.0] c'), len(bad)                                    # made again
    code,out,err = here(1, CC='false')                                                       # a compiler that fails
    assert (code,out)==(0, '[3.0, 5.0] numpy') and err.count('RuntimeWarning')==1
    code,out,err = here(1, CC='no-such-compiler')
    assert (code,out)==(0, '[3.0, 5.0] numpy') and 'no C compiler' in err
    assert here(1, CC='cc -DUNUSED=1 -O1')[1]=='[3.0, 5.0] c'                               # flags are part of the name
    assert here(1)[1]=='[3.0, 5.0] c' and len([*cache.glob('*.so')])==3 and {f.suffix for f in cache.iterdir()}=={'.so','.sum'}
    cache.chmod(0o777)
    code,out,err = here()
    assert (code,out)==(0, '[2.0, 4.0] numpy') and 'others may write' in err
    cache.chmod(0o500)                                                                       # nothing new can be kept
    assert here()[1]=='[2.0, 4.0] c'
    code,out,err = here(2)
    assert code==0 and out.startswith('[4.0, 6.0]')

def test_two_processes_build_at_once(tmp_path):
    with ThreadPoolExecutor(3) as pool: done = list(pool.map(lambda _: use(MINIMA_CACHE=str(tmp_path/'c')), range(3)))
    assert [d[:2] for d in done]==[(0, '[2.0, 4.0] c')]*3 and len([*(tmp_path/'c').glob('*.so')])==1

def test_a_short_script_leaves_its_program_for_the_next(tmp_path):
    "It ends while the compiler still runs in the background"
    assert use(backend='auto', MINIMA_CACHE=str(tmp_path/'d'))[:2]==(0, '[2.0, 4.0] numpy')
    for _ in range(300):
        if [*(tmp_path/'d').glob('*.so')]: break
        time.sleep(.1)
    assert use(backend='auto', MINIMA_CACHE=str(tmp_path/'d'))[:2]==(0, '[2.0, 4.0] c')

def test_one_text_is_built_twice_at_once(tmp_path):
    more = 'g = jit(lambda x: x*2 + 0, backend="auto"); g(Tensor([1.,2.])); f.wait(); g.wait(); print(*[e.backend for h in (f,g) for e in h.programs.values()])'
    assert use(backend='auto', more=more, MINIMA_CACHE=str(tmp_path/'g'))[1].splitlines()[1]=='c c'

def test_background(tmp_path):
    assert use(backend='auto', more='f.wait(); print(f(Tensor([2.,2.])).tolist(), *[e.backend for e in f.programs.values()])', MINIMA_CACHE=str(tmp_path/'e'))[1].splitlines()==['[2.0, 4.0] numpy', '[4.0, 4.0] c']

# ---------------------------------------------------------------- reading digits

def digits(backend, epochs, dropout):
    "Accuracy on the test digits of the network of nbs/41_mnist, the last losses, and seconds"
    X,y = mnist5k()
    manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Dropout(.3), nn.Linear(256, 10)) if dropout else nn.Sequential(nn.Linear(784, 100, bias=False), nn.ReLU(), nn.Linear(100, 10, bias=False))
    opt = AdamW(model.parameters(), lr=.003) if dropout else SGD(model.parameters(), lr=.5)
    schedule,step = LinearLR(opt, 1., 0., total_iters=80*epochs),step_of(model, opt, backend)
    start,losses = time.perf_counter(),[]
    for e in range(epochs):
        i = np.random.default_rng(e).permutation(len(X))
        for k in range(0, len(X), 50): losses.append(step(Tensor(X[i[k:k+50]], requires_grad=False), y[i[k:k+50]]).item()); schedule.step()
    seconds = time.perf_counter()-start
    model.eval()
    X,y = mnist5k(train=False)
    assert backend is None or backends(step)=={backend} and step.traced==1
    return float((model(Tensor(X, requires_grad=False)).numpy().argmax(1)==y).mean()),np.array(losses),seconds

@pytest.mark.parametrize('dropout', [False,True])
def test_digits(dropout):
    eager,*compiled = (digits(b, 2, dropout) for b in (None,'numpy','c'))
    assert eager[0] > .9
    for accuracy,losses,_ in compiled: assert abs(accuracy-eager[0]) <= .004 and abs(losses[:80]-eager[1][:80]).max() < 1e-3 and abs(losses-eager[1]).max() < .05

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
            for s in (10**6+start, 10**6+start+1):
                try: check_training(s, backend)
                except Exception as e: failed.append(('training', s)); print(backend, type(e).__name__, str(e)[:1500], flush=True)
    print(dict(counts), 'failed:', failed)

def read_digits():
    for dropout in (False,True):
        for backend in (None,'numpy','c'): accuracy,losses,seconds = digits(backend, 10, dropout); print(f"{'AdamW, dropout' if dropout else 'SGD':15} {backend or 'eager':6} accuracy {accuracy:.3f}, last loss {losses[-80:].mean():.5f}, {seconds:.2f} s")

if __name__=='__main__': read_digits() if sys.argv[1:]==['digits'] else main(int(sys.argv[1]) if len(sys.argv)>1 else 1000)
