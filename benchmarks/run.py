"""minima, torch and hand-written NumPy on the same work, and compiled loops beside NumPy's: python benchmarks/run.py

Each library runs in a process of its own, pinned to the same core. The parent asks them in turn, round after round,
compares the numbers that they return, and prints medians and ratios of medians. `--threads 2` leaves both cores free."""
import argparse, gc, json, os, resource, statistics, subprocess, sys, time
from pathlib import Path

root = Path(__file__).parent.parent
works = dict(a='chain of 1,000 operations on 8 numbers (µs an operation)', b='10 elementwise operations, 1024×1024 (ms)',
             c='step of 784-100-10, batch 100 (ms)', d='step of 784-1024-1024-10, batch 128, Adam (ms)', g='chain of 100,000 nodes (ms)')
loops = dict(h='4 elementwise operations, 1024×1024 (ms)', i='a row and a column added, 1024×1024 (ms)', j='sum over axis 0 and over axis 1, 1024×1024 (ms)', k='product, 512×512 (ms)')
scale = dict(a=1e3, b=1e3, c=1e3, d=1e3, g=1e3) | dict.fromkeys(loops, 1e3) # seconds to the unit above; (a) divides by 1,000 operations
repeats = dict(a=5, b=1, c=20, d=3, g=1) | dict.fromkeys(loops, 5)

def data(sizes, batch):
    import numpy as np
    rng = np.random.default_rng(0)
    X,y = rng.random((batch,sizes[0]), dtype=np.float32),rng.integers(0, sizes[-1], batch)
    Ws = [rng.standard_normal((m,n), dtype=np.float32)*(2/n)**.5 for n,m in zip(sizes, sizes[1:])]
    return X, y, Ws, [np.zeros(m, np.float32) for m in sizes[1:]]

def chain_inputs():
    import numpy as np
    rng = np.random.default_rng(1)
    return [rng.random(8, dtype=np.float32) + np.float32(.5) for _ in range(2)] + [np.float32(.01)*rng.random(8, dtype=np.float32)]

def big_inputs():
    import numpy as np
    rng = np.random.default_rng(2)
    return [rng.random((1024,1024), dtype=np.float32) + np.float32(.5) for _ in range(2)]

def chain(x, w, b, n):
    "n operations, the same in both libraries"
    y = x
    for _ in range(n//4): y = (y*w + b).relu()*0.999
    return y

def elementwise(x, w):
    "Ten different operations"
    return ((-(((x*w + x).relu()*0.5).exp() + 1.)/w) - x)**2

class Minima:
    def __init__(self):
        import minima as mi
        from minima import optim
        self.mi,self.optim = mi,optim
    def leaf(self, a): return self.mi.Tensor(a)
    def const(self, a): return self.mi.Tensor(a, requires_grad=False)
    def a(self, n=1000):
        x,w,b = (f(a) for f,a in zip((self.leaf,self.const,self.const), chain_inputs()))
        w = self.const(1/(1+0*w.numpy()))
        def step(): x.grad = None; y = chain(x, w, b, n).sum(); y.backward(); return y
        return step, lambda y: [y.item(), float(x.grad.numpy().sum())]
    def g(self): return self.a(100_000)
    def b(self):
        x,w = map(self.leaf, big_inputs())
        def step(): x.grad = w.grad = None; y = elementwise(x, w).sum(); y.backward(); return y
        return step, lambda y: [y.item(), float(x.grad.numpy().sum()), float(w.grad.numpy().sum())]
    def net(self, sizes, batch, opt):
        X,y,Ws,bs = data(sizes, batch)
        X,Ws,bs = self.const(X),[self.leaf(w) for w in Ws],[self.leaf(b) for b in bs]
        opt = opt(Ws+bs)
        linear,cross_entropy = self.mi.linear,self.mi.cross_entropy
        def step():
            h = X
            for W,b in zip(Ws[:-1], bs[:-1]): h = linear(h, W, b).relu()
            loss = cross_entropy(linear(h, Ws[-1], bs[-1]), y)
            opt.zero_grad(); loss.backward(); opt.step()
            return loss
        return step, lambda loss: [loss.item(), *(float(abs(W.detach().numpy()).sum()) for W in Ws)]
    def c(self): return self.net((784,100,10), 100, lambda ps: self.optim.SGD(ps, lr=.1))
    def d(self): return self.net((784,1024,1024,10), 128, lambda ps: self.optim.Adam(ps, lr=1e-4))

class Torch(Minima):
    def __init__(self):
        import torch
        torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
        self.torch,self.optim = torch,torch.optim
        self.mi = type('names', (), dict(linear=staticmethod(torch.nn.functional.linear), cross_entropy=staticmethod(lambda z,y: torch.nn.functional.cross_entropy(z, self.labels(y)))))
        self._labels = {}
    def labels(self, y):
        if id(y) not in self._labels: self._labels[id(y)] = self.torch.tensor(y)
        return self._labels[id(y)]
    def leaf(self, a): return self.torch.tensor(a, requires_grad=True)
    def const(self, a): return self.torch.tensor(a)
    def net(self, *args):
        step,numbers = super().net(*args)
        return step, numbers

class Numpy:
    "Forward and backward written out, every array allocated once"
    def a(self, n=1000):
        import numpy as np
        x,w,b = chain_inputs(); w = 1/(1+0*w); s = np.asarray(.999, np.float32); zero = np.zeros((), np.float32)
        k = n//4
        R,T,G = np.empty((k,8), np.float32),np.empty(8, np.float32),np.empty(8, np.float32)
        mul,add,maximum,greater = np.multiply,np.add,np.maximum,np.greater
        rows,mask = list(R),np.empty(8, bool)
        def step():
            y = x
            for r in rows: mul(y, w, T); add(T, b, T); maximum(T, zero, out=r); y = mul(r, s, T)
            total = y.sum(); G[:] = 1
            for r in reversed(rows): mul(G, s, G); greater(r, zero, mask); mul(G, mask, G); mul(G, w, G)
            return total
        return step, lambda y: [float(y), float(G.sum())]
    def g(self): return self.a(100_000)
    def b(self):
        import numpy as np
        x,w = big_inputs()
        A,B,C,GX,GW,M = (np.empty_like(x) for _ in range(6)); mask = np.empty(x.shape, bool)
        half,one,two,zero = (np.asarray(v, np.float32) for v in (.5,1,2,0))
        def step():
            np.multiply(x, w, A); np.add(A, x, A); np.maximum(A, zero, out=A)
            np.multiply(A, half, B); np.exp(B, B); np.add(B, one, C); np.negative(C, C); np.divide(C, w, C)
            np.subtract(C, x, GX); np.multiply(GX, GX, M); total = M.sum()
            np.multiply(GX, two, GX); np.divide(GX, w, M)           # adjoints of C - x and of the numerator
            np.multiply(M, C, GW); np.negative(GW, GW); np.negative(GX, GX)
            np.negative(M, M); np.multiply(M, B, M); np.multiply(M, half, M)
            np.greater(A, zero, mask); np.multiply(M, mask, M)
            np.add(GX, M, GX); np.multiply(M, w, C); np.add(GX, C, GX); np.multiply(M, x, C); np.add(GW, C, GW)
            return total
        return step, lambda y: [float(y), float(GX.sum()), float(GW.sum())]
    def net(self, sizes, batch, adam):
        import numpy as np
        X,y,Ws,bs = data(sizes, batch)
        ps = Ws+bs; gs = [np.empty_like(p) for p in ps]; ts = [np.empty_like(p) for p in ps]
        ms,vs = ([np.zeros_like(p) for p in ps] for _ in range(2)); t = [0]
        n = len(Ws); Z = [np.empty((batch,m), np.float32) for m in sizes[1:]]; H = [X]+[np.empty_like(z) for z in Z[:-1]]
        G,masks,rows,zero = [np.empty_like(z) for z in Z],[np.empty(z.shape, bool) for z in Z],np.arange(batch),np.zeros((), np.float32)
        def step():
            for i in range(n):
                np.matmul(H[i], Ws[i].T, Z[i]); Z[i] += bs[i]
                if i<n-1: np.maximum(Z[i], zero, out=H[i+1])
            z = Z[-1]; z -= z.max(1, keepdims=True); e = np.exp(z, G[-1]); s = e.sum(1, keepdims=True)
            loss = (np.log(s)[:,0] - z[rows,y]).mean()
            e /= s; e[rows,y] -= 1; e /= batch
            for i in range(n-1, -1, -1):
                np.matmul(G[i].T, H[i], gs[i]); np.sum(G[i], 0, out=gs[n+i])
                if i: np.matmul(G[i], Ws[i], G[i-1]); np.greater(H[i], zero, masks[i-1]); G[i-1] *= masks[i-1]
            t[0] += 1
            if adam:
                c1,c2 = 1-.9**t[0],(1-.999**t[0])**.5
                for p,g,m,v,u in zip(ps, gs, ms, vs, ts):
                    m *= .9; np.multiply(g, .1, u); m += u
                    v *= .999; np.multiply(g, g, u); u *= .001; v += u
                    np.sqrt(v, u); u += 1e-8*c2; np.divide(m, u, u); u *= 1e-4*c2/c1; p -= u
            else:
                for p,g in zip(ps, gs): g *= .1; p -= g
            return loss
        return step, lambda loss: [float(loss), *(float(abs(W).sum()) for W in Ws)]
    def c(self): return self.net((784,100,10), 100, False)
    def d(self): return self.net((784,1024,1024,10), 128, True)

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

libraries = dict(minima=Minima, torch=Torch, numpy=Numpy)
workers = libraries | dict(ndarray=Compiled, arrays=Arrays)

def peak_kib(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def worker(name):
    "Answer requests, a line of JSON each"
    lib,ready = workers[name](),{}
    for line in sys.stdin:
        work,kind = json.loads(line)
        if kind=='memory': # how far the peak rises above what was there before, in a process that has done nothing else
            step,_ = getattr(lib, work)(); gc.collect(); before = peak_kib()
            for _ in range(50 if work=='d' else 1): step()
            print(json.dumps((peak_kib()-before)/1024), flush=True); continue
        if work not in ready:
            step,numbers = getattr(lib, work)()
            ready[work] = step,numbers(step())
        step,numbers = ready[work]
        gc.collect()
        t = time.perf_counter()
        for _ in range(repeats[work]): step()
        print(json.dumps([(time.perf_counter()-t)/repeats[work], numbers]), flush=True)

def start(name, threads):
    env = {k:v for k,v in os.environ.items() if not k.startswith('OPENBLAS_')} | {k:str(threads) for k in ('OMP_NUM_THREADS','OPENBLAS_NUM_THREADS','MKL_NUM_THREADS','NUMBA_NUM_THREADS')}
    env['PYTHONPATH'] = str(root)
    pin = ['taskset','-c','0'] if threads==1 else []
    return subprocess.Popen([*pin, sys.executable, __file__, '--worker', name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

def ask(process, work, kind='time'):
    process.stdin.write(json.dumps([work,kind])+'\n'); process.stdin.flush()
    line = process.stdout.readline()
    if not line: raise RuntimeError(f'a worker died on {work}')
    return json.loads(line)

def alternate(work, processes, rounds):
    "Median times of the workers, asked in turns; their numbers have to agree"
    times,numbers = {m:[] for m in processes},{}
    for _ in range(rounds):
        for m,proc in processes.items():
            t,numbers[m] = ask(proc, work); times[m].append(t*scale[work])
    first = next(iter(numbers))
    for m in numbers:
        for x,y in zip(numbers[first], numbers[m]):
            if abs(x-y) > 2e-3*max(1,abs(y)): raise SystemExit(f'({work}) {first} {numbers[first]} and {m} {numbers[m]} disagree')
    return [statistics.median(times[m]) for m in processes]

def stop(processes):
    for proc in processes.values(): proc.stdin.close(); proc.wait()

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
    p.add_argument('--works', default='abcdgefhijk', help='letters of the rows to run')
    args = p.parse_args()
    if args.worker: return worker(args.worker)
    print(f"{args.threads} thread{'s' if args.threads>1 else ', pinned to one core'}; medians of {args.rounds} alternating rounds\n")
    processes = {m:start(m, args.threads) for m in libraries if set(args.works) & set(works)}
    if set(args.works) & {*works,'e'}: print(f"| {'work':<52} | minima | torch | NumPy by hand | minima / torch | NumPy / torch |\n|---|---|---|---|---|---|")
    row = lambda name,m,t,n: print(f'| {name:<52} | {m:.3g} | {t:.3g} | {n:.3g} | {m/t:.2f} | {n/t:.2f} |', flush=True)
    for work in (w for w in works if w in args.works):
        row(f'({work}) {works[work]}', *alternate(work, processes, args.rounds if work!='g' else max(3, args.rounds//3)))
    stop(processes)
    for work,name in (('d','(e) peak memory of 50 steps of (d) (MiB)'),('g','(g) peak memory of the chain (MiB)')):
        if not ('e' if work=='d' else 'g') in args.works: continue
        peaks = {}
        for m in libraries:
            proc = start(m, args.threads); peaks[m] = ask(proc, work, 'memory'); stop({m:proc})
        row(name, *peaks.values())
    if 'f' in args.works:
        t = import_times(args.rounds)
        print(f"\n(f) import minima {t['minima']*1e3:.0f} ms, import numpy {t['numpy']*1e3:.0f} ms, ratio {t['minima']/t['numpy']:.2f}")
    if set(args.works) & set(loops):
        print(f"\n| {'work':<52} | NDArray, compiled | NumPy | NDArray / NumPy |\n|---|---|---|---|")
        processes = {m:start(m, args.threads) for m in ('ndarray','arrays')}
        for work in (w for w in loops if w in args.works):
            ours,theirs = alternate(work, processes, args.rounds)
            print(f"| {f'({work}) {loops[work]}':<52} | {ours:.3g} | {theirs:.3g} | {ours/theirs:.2f} |", flush=True)
        stop(processes)

if __name__=='__main__': main()
