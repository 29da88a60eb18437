"What a notebook cannot show of workers: spawned processes, sudden deaths, the end of the program; and that every data file has its licence"
import gc, multiprocessing, os, pickle, signal, subprocess, sys, textwrap, threading, time
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from minima.data import *
from rows import *

root = Path(__file__).parent.parent
contexts = multiprocessing.get_all_start_methods()

def nobody_left():
    gc.collect()
    return not multiprocessing.active_children() and not [t for t in threading.enumerate() if t.name.startswith('DataLoader')]

@pytest.mark.parametrize('context', contexts)
def test_processes_make_the_same_batches(context):
    def batches(**kw): return [b for l in [DataLoader(Rows(), 5, True, generator=4, transform=noise, **kw)] for _ in range(2) for b in l]
    got = batches(num_workers=2, worker='process', multiprocessing_context=context, persistent_workers=True)
    for (x,t),(u,v) in zip(got, batches(), strict=True):
        np.testing.assert_array_equal(x, u)
        np.testing.assert_array_equal(t, v)
        assert x.flags.writeable
    assert nobody_left()

@pytest.mark.parametrize('context', contexts)
def test_array_dataset_in_processes(context):
    ds = ArrayDataset(np.arange(20.).reshape(10,2), np.arange(10))
    got = list(DataLoader(Subset(ds, range(1, 10)), 4, num_workers=2, worker='process', multiprocessing_context=context))
    assert [t.tolist() for _,t in got]==[[1,2,3,4],[5,6,7,8],[9]] and nobody_left()

def test_large_jobs_do_not_block():
    "Row numbers and batches larger than a pipe holds"
    n = 60_000
    loader = DataLoader(ArrayDataset(np.arange(n*4).reshape(n,4)), n//3, True, num_workers=2, worker='process', generator=0, prefetch_factor=4)
    assert sorted(np.concatenate([x[:,0] for x, in loader]).tolist())==list(range(0, 4*n, 4)) and nobody_left()

def test_global_generators_of_processes():
    "Two forks of one parent do not draw the same numbers, and draw them again in the next run"
    def drawn(n): return np.concatenate([b[k] for b in DataLoader(Drawing(), 2, num_workers=n, worker='process', generator=1) for k in (0,1)])
    a = drawn(2)
    assert len(set(a.tolist()))==24
    np.testing.assert_array_equal(a, drawn(3))

errors = {'plain':(KeyError,'seven'), 'os':(FileNotFoundError,'seven.png'), 'decode':(UnicodeDecodeError,'invalid start byte'), 'stubborn':(Stubborn,'seven.png:3'),
          'sealed':(Sealed,'seven'), 'local':(RuntimeError,'Local: seven'), 'batch':(pickle.PicklingError,'not this one'), 'exit':(RuntimeError,'exit code 3')}
if os.name=='posix': errors['kill'] = RuntimeError,'exit code -9'

@pytest.mark.parametrize('persistent', (False,True))
@pytest.mark.parametrize('how', errors)
def test_errors_of_processes(how, persistent):
    kind,says = errors[how]
    loader = DataLoader(Raising(how), 2, num_workers=2, worker='process', collate_fn=as_they_are, persistent_workers=persistent)
    with pytest.raises(kind, match=says) as e:
        for b in loader: pass
    assert type(e.value) is kind and loader.position==3 # batches 0, 1 and 2 came
    if how not in ('exit','kill'): assert 'Traceback' in str(e.value.__cause__) and 'in __getitem__' in str(e.value.__cause__) or how=='batch'
    if how=='os': assert e.value.filename=='seven.png'
    if how=='stubborn': assert e.value.line==3
    del e, loader
    assert nobody_left()

@pytest.mark.parametrize('how', ('plain','stubborn','local'))
def test_errors_of_threads(how):
    with pytest.raises(Exception, match='seven') as e: list(DataLoader(Raising(how), 2, num_workers=2))
    assert type(e.value).__name__==dict(plain='KeyError', stubborn='Stubborn', local='Local')[how] and nobody_left()

@pytest.mark.parametrize('context', contexts)
def test_busy_processes_do_not_delay_a_break(context):
    for persistent in (False,True):
        loader = DataLoader(Sleeping(), 2, num_workers=2, worker='process', multiprocessing_context=context, persistent_workers=persistent)
        for b in loader:
            start = time.perf_counter()
            break
        del loader
        assert nobody_left() and time.perf_counter()-start < 5

@pytest.mark.skipif(os.name!='posix', reason='sends itself a signal')
def test_interrupt_ends_the_workers():
    it = iter(DataLoader(Sleeping(), 2, num_workers=2, worker='process'))
    next(it)
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        next(it)
    assert nobody_left()

program = textwrap.dedent('''
    import multiprocessing, os, sys, time
    import rows
    from minima.data import DataLoader
    if __name__=='__main__':
        it = iter(DataLoader(rows.Rows(1000), 2, num_workers=3, worker=sys.argv[1], multiprocessing_context=sys.argv[2], persistent_workers=sys.argv[3]=='keep'))
        next(it)
        print(*[p.pid for p in multiprocessing.active_children()], flush=True)
        if sys.argv[4]=='wait': time.sleep(60)
    ''')

def start(tmp_path, *args):
    (tmp_path/'program.py').write_text(program)
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(root), str(root/'tests')])}
    return subprocess.Popen([sys.executable, tmp_path/'program.py', *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

def alive(pid): # a process nobody has waited for yet is dead all the same
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]!='Z'
    except FileNotFoundError: return False

@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks at /proc')
@pytest.mark.parametrize('context', contexts)
def test_killed_program_leaves_no_process(tmp_path, context):
    p = start(tmp_path, 'process', context, 'no', 'wait')
    pids = p.stdout.readline().split()
    assert len(pids)==3 and all(map(alive, pids))
    p.kill()
    p.wait()
    p.stdout.close(); p.stderr.close()
    end = time.monotonic()+10
    while any(map(alive, pids)) and time.monotonic()<end: time.sleep(.05)
    assert not any(map(alive, pids))

@pytest.mark.parametrize('worker,context', [('thread',contexts[0]), *(('process',c) for c in contexts)])
@pytest.mark.parametrize('persistent', ('no','keep'))
def test_program_ends_with_an_unfinished_epoch(tmp_path, worker, context, persistent):
    out,err = (p := start(tmp_path, worker, context, persistent, 'end')).communicate(timeout=60)
    assert p.returncode==0 and not err
    assert not any(map(alive, out.split()))

@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_any_text_comes_back(text):
    for t in (ByteTokenizer(), CharTokenizer(text), BPETokenizer.train(text, 300)): assert t.decode(t.encode(text))==text

def test_every_data_file_has_its_licence():
    folder = root/'minima'/'datasets'
    heads = [f.read_text(encoding='utf-8').partition('Source')[0] for f in folder.glob('LICENSE-*.txt')]
    files = [f.name for f in folder.iterdir() if f.is_file() and not f.name.startswith('LICENSE')]
    assert len(files)==7 and all(any(f in h for h in heads) for f in files)
