"""Compiled beside eager: the ledger, random programs, training steps, and all that a user can do to a compiled function.

`python tests/test_compile.py 1000` checks as many random programs, and a tenth as many random trainings, with both back-ends, and reports."""
import os, sys, warnings
from collections import Counter
import numpy as np
import pytest
from minima import nn
from minima.autograd import Tensor
from minima.compile import compiled_marks, jit
from minima.init import manual_seed
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
        self.opt = opt([dict(params=ps[:cut], lr=.02), dict(params=ps[cut:])] if cut and rng.integers(2) else ps, lr=.05, **options)
        self.clip,self.ema = pick(rng, None, .1, 1.),ModelEMA(self.model, .9)
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
        norm = clip_grad_norm_(self.model.parameters(), self.clip) if self.clip else None
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
        if isinstance(b, (np.ndarray,np.generic)): assert a.dtype==b.dtype, where; _compare(a, b, tol, where, 'eager')
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

@pytest.mark.parametrize('seed', range(12))
def test_random_trainings_in_c(seed): check_training(seed, 'c')

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

if __name__=='__main__': main(int(sys.argv[1]) if len(sys.argv)>1 else 1000)
