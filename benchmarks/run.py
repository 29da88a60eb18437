"""Training steps of minima, torch and hand-written NumPy, and of what compiles them, and compiled loops beside NumPy's: python benchmarks/run.py

Each library runs in a process of its own, pinned to the same core. The parent asks them in turn, round after round,
compares the numbers that they return, and prints medians and ratios of medians. `--threads 2` leaves both cores free."""
import argparse, gc, json, os, statistics, subprocess, sys, tempfile, time
from math import prod
from pathlib import Path

root = Path(__file__).parent.parent
works = dict( # letter: name, and steps that are timed together
    a=('chain of 1,000 operations on 8 numbers (µs an operation)', 5), # that is, ms for all of them
    b=('10 elementwise operations, 1024×1024 (ms)', 1),
    c=('step of 784-100-10, batch 100 (ms)', 20),
    d=('step of 784-1024-1024-10, batch 128, Adam (ms)', 3),
    l=('step of LeNet, batch 32 (ms)', 5),
    t=('transformer block, forward and backward (ms)', 3),
    g=('chain of 100,000 nodes (ms)', 1))
loops = dict(
    h=('4 elementwise operations, 1024×1024 (ms)', 5),
    i=('a row and a column added, 1024×1024 (ms)', 5),
    j=('sum over axis 0 and over axis 1, 1024×1024 (ms)', 5),
    k=('product, 512×512 (ms)', 5))
steps = {k:n for k,(_,n) in {**works, **loops}.items()}

def data(sizes, batch):
    import numpy as np
    rng = np.random.default_rng(0)
    X,y = rng.random((batch,sizes[0]), dtype=np.float32),rng.integers(0, sizes[-1], batch)
    Ws = [rng.standard_normal((m,n), dtype=np.float32)*(2/n)**.5 for n,m in zip(sizes, sizes[1:])]
    return X, y, Ws, [np.zeros(m, np.float32) for m in sizes[1:]]

def chain_inputs():
    import numpy as np
    rng = np.random.default_rng(1)
    return rng.random(8, dtype=np.float32) + np.float32(.5), np.ones(8, np.float32), np.float32(.01)*rng.random(8, dtype=np.float32)

def big_inputs():
    import numpy as np
    rng = np.random.default_rng(2)
    return [rng.random((1024,1024), dtype=np.float32) + np.float32(.5) for _ in range(2)]

def weights(rng, shapes):
    "Weights and biases, under torch's names"
    ws = {}
    for name,s in shapes.items():
        w,b = rng.standard_normal(s, dtype='float32'),rng.standard_normal(s[0], dtype='float32')*.1
        ws[f'{name}weight'],ws[f'{name}bias'] = w*(2/prod(s[1:]))**.5 if len(s)>1 else 1 + .1*w,b
    return ws

def lenet_inputs():
    "Images (32, 1, 28, 28), class numbers (32,), weights"
    import numpy as np
    rng = np.random.default_rng(3)
    return rng.random((32,1,28,28), dtype='float32'), rng.integers(0, 10, 32), weights(rng, {'0.':(6,1,5,5), '3.':(16,6,5,5), '7.':(120,256), '9.':(84,120), '11.':(10,84)})

heads = 4
def block_inputs(d=128):
    "Sequences (8, 64, d), weights"
    import numpy as np
    rng = np.random.default_rng(4)
    return rng.standard_normal((8,64,d), dtype='float32'), weights(rng, {'self_attn.in_proj_':(3*d,d), 'self_attn.out_proj.':(d,d), 'linear1.':(4*d,d), 'linear2.':(d,4*d), 'norm1.':(d,), 'norm2.':(d,)})

def total(a): return float(abs(a).sum())
def moved(ps, old): return [total(p-o) for p,o in zip(ps, old(), strict=True)] # `old` makes the first weights anew: a copy would count as memory

def chain(x, w, b, n):
    "n operations, the same in both libraries"
    y = x
    for _ in range(n//4): y = (y*w + b).relu()*0.999
    return y

def elementwise(x, w):
    "Ten different operations"
    return ((-(((x*w + x).relu()*0.5).exp() + 1.)/w) - x)**2

class Minima:
    "Each work is a pair: a function that takes a step, and one that makes numbers to compare of what it returned"
    title,compiles,causal = 'minima',False,dict(is_causal=True)
    def __init__(self):
        import minima as mi
        from minima import nn, optim
        from minima.transformer import TransformerEncoderLayer
        self.mi,self.nn,self.optim,self.Block,self.linear,self.cross_entropy = mi,nn,optim,TransformerEncoderLayer,mi.linear,mi.cross_entropy
    def leaf(self, a): return self.mi.Tensor(a)
    def const(self, a): return self.mi.Tensor(a, requires_grad=False)
    def labels(self, y): return y
    def step(self, loss, leaves, opt=None):
        "Forward, backward and, with an optimiser, the update"
        def step():
            y = loss()
            if opt: opt.zero_grad()
            else:
                for p in leaves: p.grad = None
            y.backward()
            if opt: opt.step()
            return y
        return step
    def gradients(self, loss, leaves):
        return self.step(loss, leaves), lambda y: [y.item(), *(total(p.grad.numpy()) for p in leaves)]
    def training(self, loss, leaves, opt, old):
        return self.step(loss, leaves, opt), lambda y: [y.item(), *moved([p.detach().numpy() for p in leaves], old)]
    def a(self, n=1000):
        x,w,b = chain_inputs(); x,w,b = self.leaf(x),self.const(w),self.const(b)
        return self.gradients(lambda: chain(x, w, b, n).sum(), [x])
    def g(self): return self.a(100_000)
    def b(self):
        x,w = map(self.leaf, big_inputs())
        return self.gradients(lambda: elementwise(x, w).sum(), [x,w])
    def net(self, sizes, batch, opt, **options):
        X,y,Ws,bs = data(sizes, batch)
        X,y,Ws,bs = self.const(X),self.labels(y),[self.leaf(w) for w in Ws],[self.leaf(b) for b in bs]
        linear,cross_entropy = self.linear,self.cross_entropy
        def loss():
            h = X
            for W,b in zip(Ws[:-1], bs[:-1]): h = linear(h, W, b).relu()
            return cross_entropy(linear(h, Ws[-1], bs[-1]), y)
        return self.training(loss, Ws+bs, opt(Ws+bs, **options), lambda: sum(data(sizes, batch)[2:], []))
    def c(self): return self.net((784,100,10), 100, self.optim.SGD, lr=.1)
    def d(self): return self.net((784,1024,1024,10), 128, self.optim.Adam, lr=1e-4)
    def load(self, model, ws):
        "Parameters, in the order of the weights"
        model.load_state_dict({n:self.const(w) for n,w in ws.items()})
        ps = dict(model.named_parameters())
        return [ps[n] for n in ws]
    def l(self):
        X,y,ws = lenet_inputs()
        X,y,nn = self.const(X),self.labels(y),self.nn
        model = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
        ps = self.load(model, ws)
        return self.training(lambda: self.cross_entropy(model(X), y), ps, self.optim.SGD(ps, lr=.1), lambda: lenet_inputs()[2].values())
    def t(self):
        x,ws = block_inputs()
        x,model = self.leaf(x),self.Block(x.shape[-1], heads, 4*x.shape[-1], 0., 'gelu', batch_first=True, norm_first=True)
        ps = self.load(model, ws)
        def loss(): z = model(x, **self.causal); return (z*z).sum()
        return self.gradients(loss, [x,*ps])

class InC(Minima):
    title,compiles,backend,g = 'minima, C',True,'c',None
    def __init__(self):
        super().__init__()
        import warnings
        from minima import jit
        warnings.filterwarnings('error', 'jit') # what cannot be compiled is no result
        self.jit = jit
    def step(self, *args): return self.jit(super().step(*args), backend=self.backend, threads=int(os.environ['OMP_NUM_THREADS']))

class InNumpy(InC): title,backend = 'minima, compiled NumPy','numpy'

class Torch(Minima):
    title = 'torch'
    def __init__(self):
        import torch
        torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
        F = torch.nn.functional
        self.torch,self.nn,self.optim,self.Block,self.linear,self.cross_entropy = torch,torch.nn,torch.optim,torch.nn.TransformerEncoderLayer,F.linear,F.cross_entropy
        self.causal = dict(src_mask=self.nn.Transformer.generate_square_subsequent_mask(64), is_causal=True)
    def leaf(self, a): return self.torch.tensor(a, requires_grad=True)
    def const(self, a): return self.torch.tensor(a)
    def labels(self, y): return self.torch.tensor(y)

class TorchCompile(Torch):
    "Forward and backward compiled, and Adam's update; that of SGD is slower compiled"
    title,compiles,g = 'torch.compile',True,None
    def step(self, loss, leaves, opt=None):
        if isinstance(opt, self.optim.Adam): opt.step = self.torch.compile(opt.step)
        return super().step(self.torch.compile(loss), leaves, opt)

class Jax:
    "The whole step as one program, weights and state donated"
    title,compiles = 'jax.jit',True
    def __init__(self):
        import jax
        self.jax,self.np = jax,jax.numpy
    def gradients(self, loss, leaves, *rest):
        leaves,rest = [self.np.asarray(a) for a in leaves],[self.np.asarray(a) for a in rest]
        f = self.jax.jit(self.jax.value_and_grad(loss))
        return lambda: self.jax.block_until_ready(f(leaves, *rest)), lambda r: [float(r[0]), *map(total, r[1])]
    def training(self, loss, ps, old, *rest, lr, adam=False):
        np = self.np
        def update(state, *rest):
            ps,ms,vs,t = state
            y,gs = self.jax.value_and_grad(loss)(ps, *rest)
            if not adam: return y,([p - lr*g for p,g in zip(ps, gs)],ms,vs,t)
            t = t+1; c1,c2 = 1-.9**t,1-.999**t
            ms,vs = [.9*m + .1*g for m,g in zip(ms, gs)],[.999*v + .001*g*g for v,g in zip(vs, gs)]
            return y,([p - lr/c1*m/(np.sqrt(v/c2) + 1e-8) for p,m,v in zip(ps, ms, vs)],ms,vs,t)
        f = self.jax.jit(update, donate_argnums=0)
        state,rest = ([np.array(p) for p in ps],*([np.zeros_like(p) for p in ps*adam] for _ in range(2)),np.float32(0)),[np.asarray(a) for a in rest]
        def step():
            nonlocal state
            y,state = self.jax.block_until_ready(f(state, *rest))
            return y
        return step, lambda y: [float(y), *moved(state[0], old)]
    def cross_entropy(self, z, y): return -self.np.take_along_axis(self.jax.nn.log_softmax(z), y[:,None], 1).mean()
    def layers(self, h, Ws, bs):
        for W,b in zip(Ws[:-1], bs[:-1]): h = self.jax.nn.relu(h@W.T + b)
        return h@Ws[-1].T + bs[-1]
    def a(self):
        def loss(leaves, w, b):
            y, = leaves
            for _ in range(250): y = self.jax.nn.relu(y*w + b)*0.999
            return y.sum()
        x,w,b = chain_inputs()
        return self.gradients(loss, [x], w, b)
    def b(self):
        def loss(leaves):
            x,w = leaves
            return (((-(self.np.exp(self.jax.nn.relu(x*w + x)*0.5) + 1.)/w) - x)**2).sum()
        return self.gradients(loss, big_inputs())
    def net(self, sizes, batch, **options):
        X,y,Ws,bs = data(sizes, batch)
        n = len(Ws)
        return self.training(lambda ps,X,y: self.cross_entropy(self.layers(X, ps[:n], ps[n:]), y), Ws+bs, lambda: sum(data(sizes, batch)[2:], []), X, y, **options)
    def c(self): return self.net((784,100,10), 100, lr=.1)
    def d(self): return self.net((784,1024,1024,10), 128, lr=1e-4, adam=True)
    def l(self):
        X,y,ws = lenet_inputs()
        lax = self.jax.lax
        def part(h, K, b):
            h = self.jax.nn.relu(lax.conv_general_dilated(h, K, (1,1), 'VALID') + b[:,None,None])
            return lax.reduce_window(h, -self.np.inf, lax.max, (1,1,2,2), (1,1,2,2), 'VALID')
        def loss(ps, X, y): return self.cross_entropy(self.layers(part(part(X, *ps[:2]), *ps[2:4]).reshape(32,256), ps[4::2], ps[5::2]), y)
        return self.training(loss, list(ws.values()), lambda: lenet_inputs()[2].values(), X, y, lr=.1)
    def t(self):
        x,ws = block_inputs()
        np,nn,(n,s,d) = self.np,self.jax.nn,x.shape
        def norm(x, w, b): return (x - x.mean(-1, keepdims=True))/np.sqrt(x.var(-1, keepdims=True) + 1e-5)*w + b
        def loss(leaves):
            x,Wi,bi,Wo,bo,W1,b1,W2,b2,g1,c1,g2,c2 = leaves
            q,k,v = (norm(x, g1, c1)@Wi.T + bi).reshape(n, s, 3, heads, d//heads).transpose(2,0,3,1,4)
            a = nn.softmax(np.where(np.tri(s, dtype=bool), q@k.mT*(d//heads)**-.5, -np.inf))@v
            y = x + a.transpose(0,2,1,3).reshape(n, s, d)@Wo.T + bo
            z = y + nn.gelu(norm(y, g2, c2)@W1.T + b1, approximate=False)@W2.T + b2
            return (z*z).sum()
        return self.gradients(loss, [x,*ws.values()])

class Numpy:
    "Forward and backward written out, every large array allocated once"
    title,compiles = 'NumPy by hand',False
    def __init__(self): import numpy
    def a(self, n=1000):
        import numpy as np
        x,w,b = chain_inputs(); s = np.asarray(.999, np.float32); zero = np.zeros((), np.float32)
        k = n//4
        R,T,G = np.empty((k,8), np.float32),np.empty(8, np.float32),np.empty(8, np.float32)
        mul,add,maximum,greater = np.multiply,np.add,np.maximum,np.greater
        rows,mask = list(R),np.empty(8, bool)
        def step():
            y = x
            for r in rows: mul(y, w, T); add(T, b, T); maximum(T, zero, out=r); y = mul(r, s, T)
            y = y.sum(); G[:] = 1
            for r in reversed(rows): mul(G, s, G); greater(r, zero, mask); mul(G, mask, G); mul(G, w, G)
            return y
        return step, lambda y: [float(y), total(G)]
    def g(self): return self.a(100_000)
    def b(self):
        import numpy as np
        x,w = big_inputs()
        A,B,C,GX,GW,M = (np.empty_like(x) for _ in range(6)); mask = np.empty(x.shape, bool)
        half,one,two,zero = (np.asarray(v, np.float32) for v in (.5,1,2,0))
        def step():
            np.multiply(x, w, A); np.add(A, x, A); np.maximum(A, zero, out=A)
            np.multiply(A, half, B); np.exp(B, B); np.add(B, one, C); np.negative(C, C); np.divide(C, w, C)
            np.subtract(C, x, GX); np.multiply(GX, GX, M); y = M.sum()
            np.multiply(GX, two, GX); np.divide(GX, w, M)           # adjoints of C - x and of the numerator
            np.multiply(M, C, GW); np.negative(GW, GW); np.negative(GX, GX)
            np.negative(M, M); np.multiply(M, B, M); np.multiply(M, half, M)
            np.greater(A, zero, mask); np.multiply(M, mask, M)
            np.add(GX, M, GX); np.multiply(M, w, C); np.add(GX, C, GX); np.multiply(M, x, C); np.add(GW, C, GW)
            return y
        return step, lambda y: [float(y), total(GX), total(GW)]
    def layers(self, X, y, Ws, bs, GX=None):
        "A function from the numbers in X, into which others may be written, to the loss, and the gradients that it leaves, in GX too"
        import numpy as np
        batch,n = len(X),len(Ws); Z = [np.empty((batch,len(W)), np.float32) for W in Ws]; H = [X]+[np.empty_like(z) for z in Z[:-1]]
        gs,G,masks,rows,zero = [np.empty_like(p) for p in Ws+bs],[np.empty_like(z) for z in Z],[np.empty(z.shape, bool) for z in Z],np.arange(batch),np.zeros((), np.float32)
        def run():
            for i in range(n):
                np.matmul(H[i], Ws[i].T, Z[i]); Z[i] += bs[i]
                if i<n-1: np.maximum(Z[i], zero, out=H[i+1])
            z = Z[-1]; z -= z.max(1, keepdims=True); e = np.exp(z, G[-1]); s = e.sum(1, keepdims=True)
            loss = (np.log(s)[:,0] - z[rows,y]).mean()
            e /= s; e[rows,y] -= 1; e /= batch
            for i in range(n-1, -1, -1):
                np.matmul(G[i].T, H[i], gs[i]); np.sum(G[i], 0, out=gs[n+i])
                if i: np.matmul(G[i], Ws[i], G[i-1]); np.greater(H[i], zero, masks[i-1]); G[i-1] *= masks[i-1]
            if GX is not None: np.matmul(G[0], Ws[0], GX)
            return loss
        return run, gs
    def net(self, sizes, batch, adam):
        import numpy as np
        X,y,Ws,bs = data(sizes, batch)
        run,gs = self.layers(X, y, Ws, bs)
        ps = Ws+bs; t = [0]
        ms,vs,ts = ([f(p) for p in ps*adam] for f in (np.zeros_like, np.zeros_like, np.empty_like))
        def step():
            loss = run(); t[0] += 1
            if adam:
                c1,c2 = 1-.9**t[0],(1-.999**t[0])**.5
                for p,g,m,v,u in zip(ps, gs, ms, vs, ts):
                    m *= .9; np.multiply(g, .1, u); m += u
                    v *= .999; np.multiply(g, g, u); u *= .001; v += u
                    np.sqrt(v, u); u += 1e-8*c2; np.divide(m, u, u); u *= 1e-4*c2/c1; p -= u
            else:
                for p,g in zip(ps, gs): g *= .1; p -= g
            return loss
        return step, lambda loss: [float(loss), *moved(ps, lambda: sum(data(sizes, batch)[2:], []))]
    def c(self): return self.net((784,100,10), 100, False)
    def d(self): return self.net((784,1024,1024,10), 128, True)
    def conv(self, X, K, b, GX=None):
        "Convolution, pooling and ReLU of images (channels, batch, rows, columns): forward; backward; the result, its adjoint, and the gradients that these leave"
        import numpy as np
        (o,c,k,_),(_,n,h,_) = K.shape,X.shape; m = h-k+1
        windows = np.lib.stride_tricks.sliding_window_view(X, (k,k), (2,3)).transpose(0,4,5,1,2,3)
        cols,Z,P = (np.empty(s, np.float32) for s in ((c*k*k,n*m*m), (o,n,m,m), (o,n,m//2,m//2)))
        G,Y,GP,gK,gb,mask = np.empty_like(Z),np.empty_like(P),np.empty_like(P),np.empty_like(K),np.empty_like(b),np.empty(P.shape, bool)
        C,Kr,Zr,Gr = cols.reshape(windows.shape),K.reshape(o,-1),Z.reshape(o,-1),G.reshape(o,-1)
        quarters,adjoints = ([a[...,i::2,j::2] for i in (0,1) for j in (0,1)] for a in (Z,G))
        def forward():
            np.copyto(C, windows); np.matmul(Kr, cols, Zr)
            np.maximum(quarters[0], quarters[1], out=P)
            for q in quarters[2:]: np.maximum(P, q, out=P)
            np.add(P, b[:,None,None,None], Y); np.maximum(Y, 0, out=Y)
        def backward():
            np.greater(Y, 0, mask); np.multiply(GP, mask, GP)
            for q,g in zip(quarters, adjoints): np.equal(q, P, mask); np.multiply(GP, mask, g)
            np.matmul(Gr, cols.T, gK.reshape(o,-1)); np.sum(GP, (1,2,3), out=gb)
            if GX is None: return
            np.matmul(Kr.T, Gr, cols); GX[:] = 0
            for i in range(k):
                for j in range(k): GX[:,:,i:i+m,j:j+m] += C[:,i,j]
        return forward, backward, Y, GP, [gK,gb]
    def l(self):
        import numpy as np
        X,y,ws = lenet_inputs()
        ps = list(ws.values()); Ws,bs = ps[4::2],ps[5::2]
        forward1,backward1,Y1,G1,gs1 = self.conv(X.transpose(1,0,2,3), *ps[:2])
        forward2,backward2,Y2,G2,gs2 = self.conv(Y1, *ps[2:4], G1)
        H,GH = np.empty((2,32,256), np.float32)
        run,gs = self.layers(H, y, Ws, bs, GH)
        images = lambda a: a.reshape(32,16,4,4).transpose(1,0,2,3)
        def step():
            forward1(); forward2(); np.copyto(images(H), Y2)
            loss = run()
            np.copyto(G2, images(GH)); backward2(); backward1()
            for p,g in zip(ps[:4]+Ws+bs, gs1+gs2+gs): g *= .1; p -= g
            return loss
        return step, lambda loss: [float(loss), *moved(ps, lambda: lenet_inputs()[2].values())]
    def t(self):
        import numpy as np
        x,ws = block_inputs()
        ps = list(ws.values()); gs = [np.empty_like(p) for p in ps]
        Wi,bi,Wo,bo,W1,b1,W2,b2,g1,c1,g2,c2 = ps
        (n,s,d),h = x.shape,heads; X = x.reshape(n*s,d)
        N1,H1,O,Y,N2,H2,Z,GZ,GY,GO,GX,U = np.empty((12,n*s,d), np.float32)
        F,E,Phi,T = np.empty((4,n*s,4*d), np.float32); A,GA = np.empty((2,n,h,s,s), np.float32); QKV,GQKV = np.empty((2,n*s,3*d), np.float32)
        (q,k,v),(gq,gk,gv) = (a.reshape(n,s,3,h,d//h).transpose(2,0,3,1,4) for a in (QKV,GQKV))
        o,go = (a.reshape(n,s,h,d//h).transpose(0,2,1,3) for a in (O,GO))
        mask,scale = np.where(np.tri(s, dtype=bool), 0, -np.inf).astype(np.float32),np.float32((d//h)**-.5)
        def linear(x, W, b, y): np.matmul(x, W.T, y); y += b
        def linear_back(g, x, W, i, gx): np.matmul(g.T, x, gs[i]); np.sum(g, 0, out=gs[i+1]); np.matmul(g, W, gx)
        def norm(x, w, b, m, y): # m: the normalised numbers
            np.subtract(x, x.mean(1, keepdims=True), m); r = 1/np.sqrt(np.vecdot(m, m)/d + np.float32(1e-5))[:,None]
            m *= r; np.multiply(m, w, y); y += b
            return r
        def norm_back(g, m, r, w, i): # in place
            np.multiply(g, m, U); np.sum(U, 0, out=gs[i]); np.sum(g, 0, out=gs[i+1])
            a,b = (g@w)[:,None]/d,(U@w)[:,None]/d
            g *= w; g -= a; np.multiply(m, b, U); g -= U; g *= r
        def normal_cdf(): # of F, in Phi, with exp(-F²/2) left in E; Abramowitz & Stegun, 7.1.26
            np.multiply(F, F, E); np.multiply(E, -.5, E); np.exp(E, E)
            np.abs(F, T); np.multiply(T, .3275911*.5**.5, T); np.add(T, 1, T); np.divide(1, T, T); np.multiply(T, 1.061405429, Phi)
            for a in (-1.453152027, 1.421413741, -.284496736, .254829592): np.add(Phi, a, Phi); np.multiply(Phi, T, Phi)
            np.multiply(Phi, E, Phi); np.multiply(Phi, -.5, Phi); np.add(Phi, .5, Phi); np.copysign(Phi, F, Phi); np.add(Phi, .5, Phi)
        def step():
            r1 = norm(X, g1, c1, N1, H1); linear(H1, Wi, bi, QKV); np.multiply(q, scale, q)
            np.matmul(q, k.mT, A); np.add(A, mask, A); np.subtract(A, A.max(-1, keepdims=True), A); np.exp(A, A); np.divide(A, A.sum(-1, keepdims=True), A)
            np.matmul(A, v, o); linear(O, Wo, bo, Y); np.add(Y, X, Y)
            r2 = norm(Y, g2, c2, N2, H2); linear(H2, W1, b1, F); normal_cdf(); np.multiply(F, Phi, T)
            linear(T, W2, b2, Z); np.add(Z, Y, Z); loss = np.vdot(Z, Z)
            np.multiply(Z, 2, GZ); np.multiply(E, F, E); np.multiply(E, (2*np.pi)**-.5, E); np.add(E, Phi, E) # E: the slope of GELU
            linear_back(GZ, T, W2, 6, F); np.multiply(F, E, F); linear_back(F, H2, W1, 4, GY)
            norm_back(GY, N2, r2, g2, 10); np.add(GY, GZ, GY); linear_back(GY, O, Wo, 2, GO)
            np.matmul(A.mT, go, gv); np.matmul(go, v.mT, GA); np.subtract(GA, np.vecdot(go, o)[...,None], GA); np.multiply(GA, A, GA)
            np.matmul(GA, k, gq); np.multiply(gq, scale, gq); np.matmul(GA.mT, q, gk); linear_back(GQKV, H1, Wi, 0, GX)
            norm_back(GX, N1, r1, g1, 8); np.add(GX, GY, GX)
            return loss
        return step, lambda loss: [float(loss), total(GX), *map(total, gs)]

class Arrays:
    "NumPy's arrays, without tensors"
    def __init__(self):
        import numpy as np, minima.device # which keeps the memory of dead arrays, for NumPy too
        self.np,self.array = np,np.asarray
    def work(self, f, *arrays):
        arrays = [self.array(a) for a in arrays]
        return lambda: f(*arrays), lambda ys: [float(y.sum()) for y in ys]
    def h(self): return self.work(lambda x,y: [self.np.maximum(x*y + x, 1)*.5], *big_inputs())
    def i(self): return self.work(lambda x,y: [x + y[0], x + y[:,:1]], *big_inputs())
    def j(self): return self.work(lambda x,y: [x.sum(axis=0), x.sum(axis=1)], *big_inputs())
    def k(self): return self.work(lambda x,y: [x@y], *(a[:512,:512].copy() for a in big_inputs()))

class Compiled(Arrays):
    "The same on minima's own array"
    def __init__(self):
        super().__init__()
        from minima.ndarray import ndarray_device
        self.array = ndarray_device('numba').xp.asarray

libraries = {'minima':Minima, 'torch':Torch, 'numpy':Numpy, 'c':InC, 'cnumpy':InNumpy, 'torch.compile':TorchCompile, 'jax':Jax}
workers = libraries | dict(ndarray=Compiled, arrays=Arrays)

def resident(what): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(what))/1024 # MiB

def memory(lib, work):
    """How far the peak rises above what the imports have left, with weights, state and programs, in a process that has done nothing else.
    Of the resident pages: what torch, jax, BLAS and code in C take, tracemalloc does not see."""
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5') # the peak starts from here
    before = resident('VmRSS')
    step,_ = getattr(lib, work)()
    for _ in range(50 if work=='d' else 1): step()
    return resident('VmHWM')-before

def first(lib, work):
    "Seconds of the first three steps beyond those of three others: what tracing and compiling take"
    step,_ = getattr(lib, work)()
    def seconds(): t = time.perf_counter(); step(); return time.perf_counter()-t
    times = [seconds() for _ in range(10)]
    return sum(times[:3]) - 3*statistics.median(times[3:])

def worker(name):
    "Answer requests, a line of JSON each; the first line says what is missing"
    def answer(x): print(json.dumps(x), file=out, flush=True)
    out,sys.stdout = sys.stdout,sys.stderr
    try: lib = workers[name]()
    except ImportError as e: return answer(str(e))
    answer(None)
    ready = {}
    def timed(lib, work):
        if work not in ready:
            step,numbers = getattr(lib, work)()
            ready[work] = step,numbers(step())
        step,numbers = ready[work]
        gc.collect()
        t = time.perf_counter()
        for _ in range(steps[work]): step()
        return [(time.perf_counter()-t)/steps[work], numbers]
    for line in sys.stdin:
        work,kind = json.loads(line)
        try: answer(dict(time=timed, memory=memory, first=first)[kind](lib, work))
        except Exception as e: answer(dict(problem=f'({work}) {name}: {type(e).__name__}: {e}'))

class Missing(Exception): "A library that is not there, or cannot do something"

def start(name, threads, **more):
    env = {k:v for k,v in os.environ.items() if not k.startswith('OPENBLAS_')} | {k:str(threads) for k in ('OMP_NUM_THREADS','OPENBLAS_NUM_THREADS','MKL_NUM_THREADS','NUMBA_NUM_THREADS')} | more
    env['PYTHONPATH'] = str(root)
    pin = ['taskset','-c','0'] if threads==1 else []
    process = subprocess.Popen([*pin, sys.executable, __file__, '--worker', name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    problem = json.loads(process.stdout.readline() or '"the worker died at once"')
    if problem: stop({name:process}); raise Missing(problem)
    return process

def ask(process, work, kind='time'):
    process.stdin.write(json.dumps([work,kind])+'\n'); process.stdin.flush()
    line = process.stdout.readline()
    if not line: raise RuntimeError(f'a worker died on {work}')
    result = json.loads(line)
    if isinstance(result, dict): raise Missing(result['problem'])
    return result

def ask_alone(name, threads, work, kind, **more):
    "An answer of a new process"
    process = start(name, threads, **more)
    try: return ask(process, work, kind)
    finally: stop({name:process})

def among(f, libs, work, problems):
    "Results of `f` for the libraries that have this work; what others say goes to `problems`"
    results = {}
    for m in libs:
        if getattr(workers[m], work, None) is None: continue
        try: results[m] = f(m)
        except Missing as e: problems.append(str(e))
    return results

def alternate(work, processes, rounds, problems):
    "Median times in ms of the workers, asked in turns; their numbers have to agree"
    able = among(lambda m: ask(processes[m], work), processes, work, problems) # and warm
    times,numbers = {m:[] for m in able},{m:r[1] for m,r in able.items()}
    for _ in range(rounds):
        for m in able: times[m].append(ask(processes[m], work)[0]*1e3)
    first = next(iter(numbers), None)
    for m in numbers:
        for x,y in zip(numbers[first], numbers[m], strict=True):
            if not abs(x-y) <= 2e-3*max(.1,abs(y)): raise SystemExit(f'({work}) {first} {numbers[first]} and {m} {numbers[m]} disagree')
    return {m:statistics.median(ts) for m,ts in times.items()}

def stop(processes):
    for proc in processes.values(): proc.stdin.close(); proc.wait()

def row(name, cells): print(f'| {name:<52} | ' + ' | '.join(c if isinstance(c, str) else '' if c is None else f'{c:.3g}' for c in cells) + ' |', flush=True)
def header(name, cells): row(name, cells); print('|---'*(len(cells)+1)+'|')

def ratios(times, libs):
    "Values, and all but torch's as multiples of torch's"
    times = [times.get(m) for m in libs]
    if 'torch' not in libs: return times
    t = times[libs.index('torch')]
    return times + [None if v is None or t is None else f'{v/t:.3g}' if v<.1*t else f'{v/t:.2f}' for m,v in zip(libs, times) if m!='torch']

def compile_time(name, work, threads, rounds):
    "Medians: cold; cached"
    times = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as d:
            caches = dict.fromkeys(('MINIMA_CACHE','TORCHINDUCTOR_CACHE_DIR','JAX_COMPILATION_CACHE_DIR'), d)
            times.append([ask_alone(name, threads, work, 'first', **caches) for _ in range(2)])
    return [statistics.median(ts) for ts in zip(*times)]

def compile_times(libs, ws, threads, rounds, problems):
    "Print the seconds until a step is compiled, with empty caches, and in a new process with these caches"
    libs = [m for m in libs if libraries[m].compiles]
    header('compile time (s)', [f'{libraries[m].title}, {c}' for m in libs for c in ('cold','cached')])
    for work in ws:
        times = among(lambda m: compile_time(m, work, threads, rounds), libs, work, problems)
        row(f'({work}) {works[work][0]}', [t for m in libs for t in times.get(m, [None]*2)])

def import_times(rounds):
    "Median seconds of `import numpy` and of `import minima`, bytecode cached, alternating"
    env = {k:v for k,v in os.environ.items() if k!='PYTHONDONTWRITEBYTECODE'} | {'PYTHONPATH':str(root)}
    times = {'numpy':[], 'minima':[]}
    for i in range(rounds+1):
        for m in times:
            code = f'import time; t=time.perf_counter(); import {m}; print(time.perf_counter()-t)'
            t = float(subprocess.run([sys.executable,'-c',code], env=env, capture_output=True, text=True, check=True).stdout)
            if i: times[m].append(t)
    return {m:statistics.median(ts) for m,ts in times.items()}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--worker', help=argparse.SUPPRESS)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--rounds', type=int, default=15)
    p.add_argument('--works', default='abcdltgefhijk', help='letters of the rows to run')
    p.add_argument('--libs', default='minima,torch,numpy,c,cnumpy', help=f'columns to run, of {",".join(libraries)}')
    p.add_argument('--more', action='store_true', help='print (e) peak memory, and compile times, too')
    args = p.parse_args()
    if args.worker: return worker(args.worker)
    if unknown := set(args.libs.split(',')) - {*libraries}: p.error(f'--libs: {", ".join(unknown)}; there are {", ".join(libraries)}')
    if args.more: args.works += 'e'
    print(f"{args.threads} thread{'s' if args.threads>1 else ', pinned to one core'}; medians of {args.rounds} alternating rounds\n")
    ws,processes,problems = [w for w in works if w in args.works],{},[]
    for m in args.libs.split(',') if ws or 'e' in args.works else ():
        try: processes[m] = start(m, args.threads)
        except Missing as e: problems.append(f'{m}: {e}')
    if libs := list(processes):
        titles = [libraries[m].title for m in libs]
        header('work', titles + [f'{t} / torch' for t in titles if t!='torch' and 'torch' in libs])
    for work in ws:
        times = alternate(work, processes, args.rounds if work!='g' else max(3, args.rounds//3), problems)
        row(f'({work}) {works[work][0]}', ratios(times, libs))
    stop(processes)
    for work,letter,name in (('d','e','(e) peak memory of 50 steps of (d) (MiB)'),('g','g','(g) peak memory of the chain (MiB)')):
        if letter in args.works: row(name, ratios(among(lambda m: ask_alone(m, args.threads, work, 'memory'), libs, work, problems), libs))
    if args.more: print(); compile_times(libs, [w for w in ws if w!='g'], args.threads, min(3, args.rounds), problems)
    if 'f' in args.works:
        t = import_times(args.rounds)
        print(f"\n(f) import minima {t['minima']*1e3:.0f} ms, import numpy {t['numpy']*1e3:.0f} ms, ratio {t['minima']/t['numpy']:.2f}")
    if set(args.works) & set(loops):
        print()
        header('work', ['NDArray, compiled', 'NumPy', 'NDArray / NumPy'])
        processes = {m:start(m, args.threads) for m in ('ndarray','arrays')}
        for work in (w for w in loops if w in args.works):
            times = alternate(work, processes, args.rounds, problems)
            row(f'({work}) {loops[work][0]}', [times.get('ndarray'), times.get('arrays'), f"{times['ndarray']/times['arrays']:.2f}" if len(times)==2 else None])
        stop(processes)
    if problems: print('\nNot measured:\n' + '\n'.join(dict.fromkeys(problems)))

if __name__=='__main__': main()
