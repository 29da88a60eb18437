"The commands as a user runs them: in a process of their own, judged by exit code, output and files"
import csv, json, os, re, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from minima.data import write_idx

root = Path(__file__).parent.parent
command = [sys.executable, '-m', 'minima.cli']
env = os.environ | {'PYTHONPATH': str(root), 'PYTHONIOENCODING': 'utf-8'}
results = ['checkpoint.npz', 'config.json', 'history.csv', 'loss.svg', 'weights.npz']
whole = results[1:] # written together, at the end

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
    assert len(re.findall(r'^ +\d+ .* s$', said[0], re.M))==10 and '\r' not in said[0] # not on a terminal: a line per epoch
    a,b = tmp_path/'a', tmp_path/'b'
    assert inside(a)==inside(b)==results
    for f in ('weights.npz', 'loss.svg'): assert (a/f).read_bytes()==(b/f).read_bytes()
    history = [[(k,v) for row in csv.DictReader((d/'history.csv').open()) for k,v in row.items() if k!='time'] for d in (a,b)]
    assert history[0]==history[1] and len(history[0])==10*4
    config = json.loads((a/'config.json').read_text())
    assert config['settings']=={'model':'mlp', 'data':None, 'hidden':256, 'epochs':10, 'lr':.3, 'batch':16, 'seed':0, 'shape':[28,28]}
    assert f"{config['result']['accuracy']:.2%}"==accuracy[0][0]+'%'
    with np.load(a/'weights.npz', allow_pickle=False) as w: assert [w[f'model.{i}.weight'].shape for i in (1,3)]==[(256,784), (10,256)]
    assert (a/'loss.svg').read_text(encoding='utf-8').startswith('<svg')

def test_compiled_is_as_good_and_repeatable(tmp_path):
    "`--jit`, broken off after an epoch and resumed, beside a run without it"
    env['MINIMA_CACHE'] = str(tmp_path/'cache')
    try:
        ok(minima('train', '--jit', '--epochs', '2', '--out', 'a', cwd=tmp_path))
        ok(minima('train', '--jit', '--epochs', '1', '--out', 'b', cwd=tmp_path))
        ok(minima('train', '--resume', '--epochs', '2', '--out', 'b', cwd=tmp_path))
    finally: del env['MINIMA_CACHE']
    ok(minima('train', '--epochs', '2', '--out', 'c', cwd=tmp_path))
    a,b,c = ((tmp_path/d/'weights.npz').read_bytes() for d in 'abc')
    assert a==b
    a,c = ([float(r['valid_loss']) for r in csv.DictReader((tmp_path/d/'history.csv').open())] for d in 'ac')
    np.testing.assert_allclose(a, c, rtol=1e-3)
    assert list((tmp_path/'cache').glob('*.so'))
    refused(minima('train', '--resume', '--jit', '--out', 'c', cwd=tmp_path), 2, '--jit')

@pytest.mark.parametrize('args', [['--help'], ['train','--help'], ['predict','--help'], ['check','--help']])
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

def start(*args, cwd):
    "A run that obeys Ctrl-C, wherever these tests are run"
    return subprocess.Popen([*command,'train',*map(str,args)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8', preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))

def stop(p, signal, epoch):
    "Wait for an epoch to be over, send a signal, and return what was said of it"
    while not re.match(rf' +{epoch} ', p.stdout.readline()): assert p.poll() is None
    time.sleep(.05) # somewhere in the next one
    p.send_signal(signal)
    return p.communicate(timeout=30)[1]

@pytest.mark.skipif(os.name=='nt', reason='Windows has no SIGINT for one child')
def test_ctrl_c_leaves_nothing(tmp_path):
    "In the first epoch"
    with start('--epochs', 100000, '--batch', 1, '--out', 'runs/new', cwd=tmp_path) as p:
        assert 'to train on' in p.stdout.readline()
        p.send_signal(signal.SIGINT)
        _,told = p.communicate(timeout=30)
    assert p.returncode==130, told
    assert 'minima train: interrupted' in told and 'Traceback' not in told
    assert inside(tmp_path)==[]

@pytest.mark.skipif(os.name=='nt', reason='Windows has no signals for one child')
@pytest.mark.parametrize('how', ['SIGINT', 'SIGKILL'])
def test_goes_on_from_the_last_epoch(how, tmp_path):
    small = '--hidden', 16, '--seed', 3, '--epochs', 5
    ok(minima('train', *small, '--out', 'whole', cwd=tmp_path))
    with start(*small, '--out', 'torn', cwd=tmp_path) as p: told = stop(p, getattr(signal, how), 1)
    assert p.returncode==(130 if how=='SIGINT' else -9), told
    assert how=='SIGKILL' or '--resume goes on' in told and 'Traceback' not in told
    assert not (tmp_path/'torn'/'weights.npz').exists()
    said = ok(minima('train', '--resume', '--out', 'torn', cwd=tmp_path))
    assert not re.search(r'^ +0 ', said, re.M) and re.search(r'^ +4 ', said, re.M)
    for f in ('weights.npz', 'loss.svg'): assert (tmp_path/'whole'/f).read_bytes()==(tmp_path/'torn'/f).read_bytes()
    assert inside(tmp_path/'torn')==results

def test_ctrl_c_keeps_older_results(tmp_path):
    "Interrupted between one file and the next"
    ok(minima('train', '--epochs', 1, '--hidden', 4, '--out', 'runs', cwd=tmp_path))
    before = {f: (tmp_path/'runs'/f).read_bytes() for f in whole}
    code = '''
import os
from minima.cli import main
fsync, calls = os.fsync, []
def stop(fd):
    calls.append(fd)
    if len(calls)==4: raise KeyboardInterrupt # the checkpoint and its folder first
    fsync(fd)
os.fsync = stop
main(['train', '--epochs', '1', '--hidden', '5', '--out', 'runs'])'''
    res = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, encoding='utf-8')
    refused(res, 130, 'interrupted')
    assert {f.name: f.read_bytes() for f in (tmp_path/'runs').iterdir() if f.name!='checkpoint.npz'}==before

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
    refused(minima('train', '--lr', 1e20, '--hidden', 16, '--out', 'new', cwd=tmp_path), 1, 'loss nan in epoch 0', 'a smaller --lr')
    assert inside(tmp_path)==[]

@pytest.mark.parametrize('args', ['--epochs 0', '--epochs 1.5', '--hidden 0', '--batch -1', '--lr 0', '--lr -1', '--lr nan', '--lr inf', '--seed -1', '--seed x',
                                  '--data nowhere', '--data .', '--nonsense', '--model vgg', '--model lenet --hidden 8', '--model gpt --hidden 30', '--model gpt --data .', '--resume', '--resume --out nowhere'])
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
    assert '50 images to train on, 50 held out; mlp, 2,944 weights' in said and 'test accuracy 100.00%' in said
    settings = json.loads((tmp_path/'out'/'config.json').read_text())['settings']
    assert (settings['data'], settings['shape'])==('mine', [6,6])

def test_bad_data_is_refused(tmp_path):
    write_mnist(tmp_path/'none', n=0)
    refused(minima('train', '--data', 'none', cwd=tmp_path), 2, '--data')
    write_mnist(tmp_path/'torn')
    whole = (f := tmp_path/'torn'/'train-images-idx3-ubyte').read_bytes()
    f.write_bytes(whole[:-1])
    refused(minima('train', '--data', 'torn', cwd=tmp_path), 2, 'train-images-idx3-ubyte')
    write_mnist(tmp_path/'small')
    refused(minima('train', '--data', 'small', '--model', 'lenet', cwd=tmp_path), 2, 'lenet: images of [6, 6]')
    (tmp_path/'short.txt').write_text('to be or not to be')
    refused(minima('train', '--data', 'short.txt', '--model', 'gpt', cwd=tmp_path), 2, 'short.txt: 18 characters')
    (tmp_path/'latin').write_bytes(b'\xe9t\xe9'*1000)
    refused(minima('train', '--data', 'latin', '--model', 'rnn', cwd=tmp_path), 2, 'no text in UTF-8')
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
    assert p.returncode==0 and '\r' in drawn and 'epoch 2' in drawn and '/250' in drawn
    assert '\r' not in said and 'test accuracy' in said
    assert inside(tmp_path/'runs'/'mnist')==results

@pytest.mark.skipif(os.name=='nt', reason='a pipe of the shell')
def test_a_reader_may_leave_early(tmp_path):
    p = subprocess.Popen([*command,'check'], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8')
    p.stdout.close()
    told = p.stderr.read()
    p.stderr.close()
    assert p.wait(timeout=60)==141 and 'Traceback' not in told and 'BrokenPipe' not in told, told

# ---------------------------------------------------------------- the models, going on, and predicting

def call(*args):
    "In this process, for speed: exit code"
    from minima.cli import main
    try: main([*map(str,args)])
    except SystemExit as e: return e.code
    return 0

def wrong(capsys, *args):
    "The last line of what is said of a wrong call"
    capsys.readouterr()
    code = call(*args)
    told = capsys.readouterr()
    refused(subprocess.CompletedProcess(args, code, told.out, told.err), 2)
    return told.err.rstrip().splitlines()[-1]

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A folder with a short run of every model"
    from minima.data import mnist5k
    folder = tmp_path_factory.mktemp('runs')
    (folder/'digits').mkdir()
    for part,train,step in (('train',True,5), ('t10k',False,5)):
        X,y = mnist5k(train)
        write_idx(folder/'digits'/f'{part}-images-idx3-ubyte', (255*X[::step]).round().astype(np.uint8).reshape(-1,28,28))
        write_idx(folder/'digits'/f'{part}-labels-idx1-ubyte', y[::step])
    from minima.data import shakespeare
    (folder/'play.txt').write_text(shakespeare()[:20_000], encoding='utf-8')
    for model in ('mlp','lenet','resnet'): assert call('train', '--model', model, '--data', folder/'digits', '--epochs', 2, '--out', folder/model)==0
    for model in ('rnn','gru','lstm','gpt'): assert call('train', '--model', model, '--data', folder/'play.txt', '--hidden', 32, '--epochs', 1, '--out', folder/model)==0
    return folder

@pytest.mark.parametrize('model,least', [('mlp',.7), ('lenet',.5), ('resnet',.3)])
def test_images_are_learned(model, least, runs):
    config = json.loads((runs/model/'config.json').read_text())
    assert config['settings']['model']==model and config['result']['accuracy'] > least
    assert inside(runs/model)==results

@pytest.mark.parametrize('model', ['rnn','gru','lstm','gpt'])
def test_texts_are_learned(model, runs):
    config = json.loads((runs/model/'config.json').read_text())
    n = len(config['settings']['chars'])
    assert config['settings']['model']==model and 40 < n < 80 and config['result']['perplexity'] < .8*n

@pytest.mark.parametrize('model', ['lenet','resnet','lstm','gpt'])
def test_one_epoch_and_one_more_are_two(model, runs, tmp_path):
    text = model in ('lstm','gpt')
    args = '--model', model, '--data', runs/('play.txt' if text else 'digits'), *(('--hidden', 32) if text else ()), '--seed', 1
    assert call('train', *args, '--epochs', 2, '--out', tmp_path/'two')==0
    assert call('train', *args, '--epochs', 1, '--out', tmp_path/'one')==0
    assert call('train', '--resume', '--epochs', 2, '--out', tmp_path/'one')==0
    for f in ('weights.npz', 'loss.svg'): assert (tmp_path/'one'/f).read_bytes()==(tmp_path/'two'/f).read_bytes()
    assert call('train', '--resume', '--out', tmp_path/'one')==0 # there is nothing left to do
    assert (tmp_path/'one'/'weights.npz').read_bytes()==(tmp_path/'two'/'weights.npz').read_bytes()

def test_a_run_is_resumed_as_it_was(runs, tmp_path, capsys):
    resume = 'train', '--resume', '--out', runs/'mlp'
    before = {f: (runs/'mlp'/f).read_bytes() for f in results}
    assert '--lr: 0.1, the run in' in wrong(capsys, *resume, '--lr', .1)
    assert '--model: gpt, the run in' in wrong(capsys, *resume, '--model', 'gpt')
    assert 'has come to 2' in wrong(capsys, *resume, '--epochs', 1)
    assert {f: (runs/'mlp'/f).read_bytes() for f in results}==before
    (tmp_path/'checkpoint.npz').write_bytes(before['checkpoint.npz'][:-1])
    assert 'wanted a whole file' in wrong(capsys, 'train', '--resume', '--out', tmp_path)
    (tmp_path/'checkpoint.npz').write_bytes(before['weights.npz'])
    assert 'no checkpoint of minima train' in wrong(capsys, 'train', '--resume', '--out', tmp_path)

def digit():
    from minima.data import mnist5k
    X,y = mnist5k(train=False)
    return (255*X[0]).round().astype(np.uint8).reshape(28,28), y[0]

def answers(capsys, *args):
    capsys.readouterr()
    assert call('predict', *args)==0
    return capsys.readouterr().out.splitlines()

@pytest.mark.parametrize('model', ['mlp','lenet','resnet'])
def test_an_image_in_every_file(model, runs, tmp_path, capsys):
    "The same digit, bright on dark and dark on bright, and larger"
    Image = pytest.importorskip('PIL.Image')
    a,_ = digit()
    np.save(tmp_path/'a.npy', a)
    np.save(tmp_path/'row.npy', (a/255).astype(np.float32).ravel())
    for end in 'png pgm bmp tiff gif webp'.split(): Image.fromarray(a).save(tmp_path/f'a.{end}', **dict(lossless=True) if end=='webp' else {})
    Image.fromarray(255-a).save(tmp_path/'paper.png')
    Image.fromarray(np.kron(255-a, np.ones((3,3), np.uint8))).convert('RGB').save(tmp_path/'large.png')
    Image.fromarray(np.dstack([0*a,0*a,0*a,a])).save(tmp_path/'transparent.png') # black ink on nothing
    Image.fromarray(a.astype(np.uint16)*257).save(tmp_path/'deep.png')
    files = sorted(tmp_path.iterdir())
    said = [l.split(': ', 1) for l in answers(capsys, '--run', runs/model, *files)]
    assert [f for f,_ in said]==[*map(str,files)]
    assert len({p for _,p in said})==1, said
    m = re.fullmatch(r'(\d) \((\S+)%\), (\d) \((\S+)%\), (\d) \((\S+)%\)', said[0][1])
    p = [float(m[i]) for i in (2,4,6)]
    assert p==sorted(p, reverse=True) and sum(p) <= 100.2 and len({m[1],m[3],m[5]})==3

def test_an_image_is_read_rightly(runs, tmp_path, capsys, monkeypatch):
    a,y = digit()
    assert y==0
    (tmp_path/'runs').mkdir()
    (tmp_path/'runs'/'mnist').symlink_to(runs/'mlp')
    monkeypatch.chdir(tmp_path)
    np.save('zero.npy', a)
    assert answers(capsys, 'zero.npy')[0].startswith('zero.npy: 0 (9') # the folder is the one that train writes to

@pytest.mark.parametrize('model', ['rnn','gru','lstm','gpt'])
def test_a_text_goes_on(model, runs, tmp_path, capsys):
    (tmp_path/'a.txt').write_text('Ham.\nTo be')
    def said(*args): return '\n'.join(answers(capsys, '--run', runs/model, '--characters', 80, *args, tmp_path/'a.txt'))
    assert len(said()) in (80,81) and said()==said()!=said('--seed', 1)
    assert said('--temperature', 0)==said('--temperature', 0, '--seed', 5)

def test_wrong_files_are_refused(runs, tmp_path, capsys):
    Image = pytest.importorskip('PIL.Image')
    a,_ = digit()
    Image.fromarray(a).save(tmp_path/'a.png')
    np.save(tmp_path/'a.npy', a)
    for f in ('a.png', 'a.npy'): (tmp_path/('torn.'+f)).write_bytes((tmp_path/f).read_bytes()[:-30])
    np.save(tmp_path/'cube.npy', np.zeros((2,3,4)))
    np.save(tmp_path/'object.npy', np.array([{}]), allow_pickle=True)
    (tmp_path/'a.txt').write_text('to be')
    (tmp_path/'empty.txt').write_text('')
    (tmp_path/'greek.txt').write_text('αβγ', encoding='utf-8')
    def said(model, f): return wrong(capsys, 'predict', '--run', runs/model, tmp_path/f)
    for f in ('torn.a.png', 'torn.a.npy', 'cube.npy', 'object.npy', 'a.txt', 'nowhere.png'): assert f in (told := said('mlp', f)) and 'reads images' in told
    for f in ('a.png', 'a.npy', 'greek.txt', 'nowhere.txt'): assert f in (told := said('gpt', f)) and 'reads texts' in told
    assert 'wanted greys (h, w)' in said('mlp', 'cube.npy')
    assert 'empty file, wanted a text' in said('gpt', 'empty.txt')
    assert 'α' in said('gpt', 'greek.txt')
    capsys.readouterr()
    assert call('predict', '--run', runs/'mlp', tmp_path/'a.png', tmp_path/'a.txt')==2 and capsys.readouterr().out=='' # no half answer

def test_wrong_folders_are_refused(runs, tmp_path, capsys):
    a,_ = digit()
    np.save(tmp_path/'a.npy', a)
    def said(folder): return wrong(capsys, 'predict', '--run', folder, tmp_path/'a.npy')
    assert 'there is no model in it' in said(tmp_path/'nowhere')
    assert 'there is no model in it' in said(tmp_path)
    good = (runs/'mlp'/'config.json').read_text()
    for bad in ('', '[]', '{}', '{"settings": 1}', good.replace('"mlp"', '"vgg"'), good.replace('256', '"x"')):
        (tmp_path/'config.json').write_text(bad)
        assert 'config.json' in said(tmp_path)
    (tmp_path/'config.json').write_text(good)
    assert 'weights.npz' in said(tmp_path)
    (tmp_path/'weights.npz').write_bytes((runs/'mlp'/'weights.npz').read_bytes()[:-9])
    assert 'weights.npz' in said(tmp_path)
    (tmp_path/'weights.npz').write_bytes((runs/'lenet'/'weights.npz').read_bytes())
    assert 'another model' in said(tmp_path)

def test_without_pillow(runs, tmp_path):
    (tmp_path/'a.png').touch()
    code = f"import sys; sys.modules['PIL'] = None\nfrom minima.cli import main; main(['predict', '--run', {str(runs/'mlp')!r}, 'a.png'])"
    res = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, encoding='utf-8')
    refused(res, 1, "pip install 'minima-dl[images]'")
