"Rows for the workers of test_data.py; a module of its own, as a spawned process imports it"
import os, pickle, random, signal, time
import numpy as np

class Rows:
    def __init__(self, n=12): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return self.row(i)
    def row(self, i): return np.full(2, i, np.float32), i

class Drawing(Rows):
    def row(self, i): return np.random.rand(), random.random()

class Stubborn(Exception): # cannot be made again from its `args`
    def __init__(self, path, line): super().__init__(f'{path}:{line}'); self.line = line
class Sealed(Exception): # nor can what it holds be pickled
    def __init__(self, what, why): super().__init__(what); self.what = lambda: why
class Raising(Rows):
    def __init__(self, how): self.n,self.how = 12,how
    def row(self, i):
        if i!=7: return i
        if self.how=='plain': raise KeyError('seven')
        if self.how=='os': raise FileNotFoundError(2, 'No such file', 'seven.png')
        if self.how=='decode': b'\xff'.decode()
        if self.how=='stubborn': raise Stubborn('seven.png', 3)
        if self.how=='sealed': raise Sealed('seven', 'because')
        if self.how=='local':
            class Local(Exception): pass
            raise Local('seven')
        if self.how=='batch': return Unpicklable()
        if self.how=='exit': os._exit(3)
        if self.how=='kill': os.kill(os.getpid(), signal.SIGKILL)

class Unpicklable:
    def __reduce__(self): raise pickle.PicklingError('not this one')
class Sleeping(Rows):
    def row(self, i):
        if i>=2: time.sleep(60)
        return i

def noise(x, rng): return x + rng.standard_normal(x.shape, np.float32)
def as_they_are(rows): return rows
