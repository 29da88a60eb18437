"The commands as a user runs them: in a process of their own, judged by exit code, output and files"
import csv, os, re, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from minima.data import write_idx

root = Path(__file__).parent.parent
command = [sys.executable, '-m', 'minima.cli']
env = os.environ | {'PYTHONPATH': str(root), 'PYTHONIOENCODING': 'utf-8'}
results = ['history.csv', 'loss.svg', 'weights.npz']

def minima(*args, cwd): return subprocess.run([*command, *map(str,args)], cwd=cwd, env=env, capture_output=True, text=True, encoding='utf-8', timeout=120)
def ok(res): assert res.returncode==0, res.stdout+res.stderr; return res.stdout
def inside(folder): return sorted(str(f.relative_to(folder)) for f in folder.rglob('*'))

def refused(res, code, *words):
    "A message, and no traceback"
    last = res.stderr.rstrip().splitlines()[-1]
    assert res.returncode==code, res.stdout+res.stderr
    assert last.startswith('minima') and 'Traceback' not in res.stderr
    assert all(w in last for w in words), last

def test_default_is_good_quick_and_repeatable(tmp_path):
    seconds, said = [], []
    for d in 'ab':
        start = time.perf_counter()
        said.append(ok(minima('train', '--out', d, cwd=tmp_path)))
        seconds.append(time.perf_counter()-start)
    accuracy = [re.findall(r'test accuracy (.+?)%', s) for s in said]
    assert accuracy[0]==accuracy[1] and float(accuracy[0][0]) >= 94
    assert min(seconds) < 30, seconds
    assert said[0].count('\nepoch ')==10 and '\r' not in said[0] # not on a terminal: a line per epoch
    a,b = tmp_path/'a', tmp_path/'b'
    assert inside(a)==inside(b)==results
    for f in ('weights.npz', 'loss.svg'): assert (a/f).read_bytes()==(b/f).read_bytes()
    history = [[(k,v) for row in csv.DictReader((d/'history.csv').open()) for k,v in row.items() if k!='seconds'] for d in (a,b)]
    assert history[0]==history[1] and len(history[0])==10*5
    with np.load(a/'weights.npz', allow_pickle=False) as w:
        assert (w['W1'].shape, w['W2'].shape, w['W1'].dtype, int(w['seed'])) == ((784,256), (256,10), np.float32, 0)
        assert f"{1-float(w['test_error']):.2%}"==accuracy[0][0]+'%'
    assert (a/'loss.svg').read_text(encoding='utf-8').startswith('<svg')

@pytest.mark.parametrize('args', [['--help'], ['train','--help'], ['check','--help']])
def test_help_has_examples(args, tmp_path):
    said = ok(minima(*args, cwd=tmp_path))
    assert 'examples:' in said and said.count('minima ') >= 2

def test_version(tmp_path):
    version = re.search(r'^version = (.+)$', (root/'settings.ini').read_text(), re.M)[1]
    assert ok(minima('--version', cwd=tmp_path)).strip()==f'minima {version}'

def test_check_passes(tmp_path):
    said = ok(minima('check', cwd=tmp_path))
    n = re.search(r'(\d+) operators, (\d+) passed, 0 failed$', said.strip())
    assert n and n[1]==n[2] and int(n[1]) >= 30 and 'MatMul' in said

def test_check_needs_no_torch_and_can_fail(tmp_path):
    wrong = "ledger.append(Case(EWiseMul, 'wrong', lambda a: a.detach()*a, (((3,),),)))"
    code = f"import sys; sys.modules['torch'] = None\nfrom minima.operators import Case, EWiseMul, ledger\n{wrong}\nfrom minima.cli import main; main(['check'])"
    res = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, encoding='utf-8')
    assert res.returncode==1 and ' 1 failed' in res.stdout and 'FAILED' in res.stdout, res.stdout+res.stderr

@pytest.mark.skipif(os.name=='nt', reason='Windows has no SIGINT for one child')
def test_ctrl_c_leaves_nothing(tmp_path):
    def start(): return subprocess.Popen([*command,'train','--epochs','100000','--hidden','8','--out','runs/new'], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8', preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    with start() as p:
        while not p.stdout.readline().startswith('epoch 2/'): assert p.poll() is None
        p.send_signal(signal.SIGINT)
        _,told = p.communicate(timeout=30)
    assert p.returncode==130, told
    assert 'minima train: interrupted' in told and 'Traceback' not in told
    assert inside(tmp_path)==[]

def test_ctrl_c_keeps_older_results(tmp_path):
    "Interrupted between one file and the next"
    ok(minima('train', '--epochs', 1, '--hidden', 4, '--out', 'runs', cwd=tmp_path))
    before = {f: (tmp_path/'runs'/f).read_bytes() for f in results}
    code = '''
import os
from minima.cli import main
fsync, calls = os.fsync, []
def stop(fd):
    calls.append(fd)
    if len(calls)==2: raise KeyboardInterrupt
    fsync(fd)
os.fsync = stop
main(['train', '--epochs', '1', '--hidden', '5', '--out', 'runs'])'''
    res = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, encoding='utf-8')
    refused(res, 130, 'interrupted')
    assert {f.name: f.read_bytes() for f in (tmp_path/'runs').iterdir()}==before

def test_unwritable_folder_is_found_before_training(tmp_path):
    (tmp_path/'file').touch()
    (tmp_path/'taken'/'loss.svg').mkdir(parents=True)
    before = inside(tmp_path)
    for out in ('file', 'file/below/it', 'taken', 'x'*300): # chmod does not stop root, so it is not tried here
        res = minima('train', '--epochs', 1000000, '--out', out, cwd=tmp_path)
        refused(res, 1, 'cannot write to '+out)
        assert 'epoch' not in res.stdout
    assert inside(tmp_path)==before

def test_divergence_is_an_error(tmp_path):
    refused(minima('train', '--lr', 1e20, '--hidden', 16, '--out', 'new', cwd=tmp_path), 1, 'loss is nan', 'nothing written')
    assert inside(tmp_path)==[]

@pytest.mark.parametrize('args', ['--epochs 0', '--epochs 1.5', '--hidden 0', '--batch -1', '--lr 0', '--lr -1', '--lr nan', '--lr inf', '--seed -1', '--seed x',
                                  '--data nowhere', '--data .', '--nonsense'])
def test_nonsense_is_refused(args, tmp_path, capsys, monkeypatch):
    from minima.cli import main # in this process, for speed
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(['train', *args.split()])
    told = capsys.readouterr()
    refused(subprocess.CompletedProcess(args, e.value.code, told.out, told.err), 2, 'error')
    assert inside(tmp_path)==[]

def test_no_command_is_an_error(tmp_path):
    refused(minima(cwd=tmp_path), 2, 'COMMAND')
    refused(minima('learn', cwd=tmp_path), 2, 'learn')

def write_mnist(folder, n=50, side=6):
    "Images whose class is the place of the bright pixel"
    folder.mkdir()
    for part in ('train','t10k'):
        y = np.arange(n, dtype=np.uint8)%10
        write_idx(folder/f'{part}-images-idx3-ubyte', (255*(np.arange(side*side)==y[:,None])).astype(np.uint8).reshape(n, side, side))
        write_idx(folder/f'{part}-labels-idx1-ubyte', y)

def test_own_data(tmp_path):
    write_mnist(tmp_path/'mine')
    said = ok(minima('train', '--data', 'mine', '--epochs', 30, '--batch', 5, '--hidden', 64, '--out', 'out', cwd=tmp_path))
    assert '50 images to train on, 50 held out; 36-64-10 units' in said and 'test accuracy 100.00%' in said
    with np.load(tmp_path/'out'/'weights.npz', allow_pickle=False) as w: assert str(w['data'])=='mine' and w['W1'].shape==(36,64)

def test_bad_data_is_refused(tmp_path):
    write_mnist(tmp_path/'none', n=0)
    refused(minima('train', '--data', 'none', cwd=tmp_path), 2, '--data')
    write_mnist(tmp_path/'torn')
    whole = (f := tmp_path/'torn'/'train-images-idx3-ubyte').read_bytes()
    f.write_bytes(whole[:-1])
    refused(minima('train', '--data', 'torn', cwd=tmp_path), 2, 'train-images-idx3-ubyte')
    assert not (tmp_path/'runs').exists()

@pytest.mark.skipif(os.name=='nt', reason='no pseudo-terminals')
def test_bar_on_a_terminal(tmp_path):
    import fcntl, pty, struct, termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    p = subprocess.Popen([*command,'train','--epochs','3','--hidden','8'], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=theirs, text=True, encoding='utf-8')
    said,_ = p.communicate(timeout=60)
    drawn = os.read(ours, 100_000).decode()
    os.close(ours), os.close(theirs)
    assert p.returncode==0 and '\r' in drawn and '3/3' in drawn and 'test error' in drawn
    assert '\nepoch' not in said and 'test accuracy' in said
    assert inside(tmp_path/'runs'/'mnist')==results

@pytest.mark.skipif(os.name=='nt', reason='a pipe of the shell')
def test_a_reader_may_leave_early(tmp_path):
    p = subprocess.Popen([*command,'check'], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8')
    p.stdout.close()
    told = p.stderr.read()
    p.stderr.close()
    assert p.wait(timeout=60)==141 and 'Traceback' not in told and 'BrokenPipe' not in told, told
