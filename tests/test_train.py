"A run that is killed, and goes on: a process of its own, SIGKILL, and the bits of all that it has learned"
import csv, os, random, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from minima.io import load, save

root = Path(__file__).parent.parent
env = os.environ | {'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
epochs,batches = 3,13
pytestmark = pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='this system has no SIGKILL')

def run(folder, die='', workers=2):
    "What is killed: chance in the data, in two generators for dropout and in the order; gradients of several batches; a rate that moves"
    from minima.data import ArrayDataset, DataLoader, mnist5k
    from minima.init import get_rng_state, manual_seed
    from minima.nn import BatchNorm1d, CrossEntropyLoss, Dropout, Linear, ReLU, Sequential
    from minima.train import CSVLogger, Callback, CheckpointCallback, EarlyStoppingCallback, GradientAccumulation, Learner, accuracy
    folder = Path(folder)
    manual_seed(0)
    model = Sequential(Linear(784, 32), BatchNorm1d(32), ReLU(), Dropout(.2), Linear(32, 16), Dropout(.1, generator=np.random.default_rng(1)), Linear(16, 10))
    data = ArrayDataset(*(a[::20] for a in mnist5k()))
    train = DataLoader(data, 16, shuffle=True, num_workers=workers, generator=5, transform=lambda x,rng: x + rng.normal(0, .1, x.shape).astype(np.float32))
    class Tell(Callback):
        order = 102
        def after_batch(self):
            if self.training: print(self.epoch, self.iter, flush=True)
    if die: # in the middle of writing, at the n-th call of a function of the system
        name,n = die.split()
        f,calls = getattr(os, name),[0]
        def killed(*args):
            calls[0] += 1
            if name=='fsync' and calls[0]==int(n): os.kill(os.getpid(), signal.SIGKILL)
            result = f(*args)
            if calls[0]==int(n): os.kill(os.getpid(), signal.SIGKILL)
            return result
        setattr(os, name, killed)
    learn = Learner((train, DataLoader(data, 100)), model, CrossEntropyLoss(), metrics=accuracy,
                    cbs=[CheckpointCallback(folder/'checkpoint.npz', every=2), GradientAccumulation(48), EarlyStoppingCallback(patience=9), CSVLogger(folder/'history.csv'), Tell()])
    with learn.no_bar(): learn.fit_one_cycle(epochs, 1e-2)
    save({'model': model.state_dict(), 'opt': learn.opt.state_dict(), 'rng': get_rng_state(), 'losses': learn.recorder.losses, 'rates': learn.recorder.lrs, 'values': [v[:-1] for v in learn.recorder.values],
          'held': [m.generator.bit_generator.state for m in model if isinstance(m, Dropout) and m.generator]}, folder/'end.npz')

def process(folder, *args):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, __file__, str(folder), *args], env=env, stdout=subprocess.PIPE, text=True)

def finish(folder, *args):
    p = process(folder, *args)
    out,_ = p.communicate(timeout=300)
    return p.returncode,out.splitlines()

@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    code,lines = finish(folder)
    assert code==0 and len(lines)==epochs*batches
    return (folder/'end.npz').read_bytes()

def whole(folder):
    "The checkpoint is there and whole, or not there"
    path = folder/'checkpoint.npz'
    return load(path)['position'] if path.exists() else None

def check_end(folder, unbroken):
    assert (folder/'end.npz').read_bytes()==unbroken
    assert not [f for f in os.listdir(folder) if f.endswith('.part')]
    assert [r['epoch'] for r in csv.DictReader((folder/'history.csv').open())]==[str(e) for e in range(epochs)]

def test_killed_at_random_moments(tmp_path, unbroken):
    rng,places = random.Random(),[]
    for _ in range(5):
        p = process(tmp_path)
        for _ in range(rng.randint(1, 9)): p.stdout.readline()
        time.sleep(rng.uniform(0, .01))
        p.send_signal(signal.SIGKILL)
        p.communicate(timeout=60)
        assert p.returncode in (-signal.SIGKILL, 0)
        places.append((p.returncode, whole(tmp_path)))
    assert [c for c,_ in places].count(-signal.SIGKILL)>=3, places
    code,lines = finish(tmp_path)
    assert code==0 and len(lines)<epochs*batches
    check_end(tmp_path, unbroken)

@pytest.mark.parametrize('moment', ['fsync 1', 'fsync 5', 'replace 4'])
def test_killed_while_writing(moment, tmp_path, unbroken):
    code,_ = finish(tmp_path, moment)
    assert code==-signal.SIGKILL
    position = whole(tmp_path)
    assert (position is None)==(moment=='fsync 1')
    assert bool([f for f in os.listdir(tmp_path) if f.endswith('.part')])==moment.startswith('fsync')
    (tmp_path/'.history.csv.1.part').write_text('') # as if it had been killed there as well
    assert finish(tmp_path)[0]==0
    check_end(tmp_path, unbroken)

def test_seed_matters(tmp_path, unbroken):
    "That the bits agree would say little if they always did"
    a = load_end(unbroken, tmp_path)
    assert len(a['losses'])==epochs*batches and len(set(a['losses']))==len(a['losses']) and len(set(a['rates']))>30
    assert a['losses'][-1] < a['losses'][0]

def load_end(raw, folder):
    (folder/'end.npz').write_bytes(raw)
    return load(folder/'end.npz')

if __name__=='__main__': run(*sys.argv[1:])
