"Models of the later chapters as graphs of ONNX, and what is said where an extra is not installed"
import sys
import numpy as np
import onnx, onnxruntime
import pytest
from minima.autograd import Tensor
from minima.io import export_onnx, load_model, save, save_model
from minima.nn import Linear, Module
from minima.sequence import LSTM
from minima.transformer import GPT, GPTConfig, MultiheadAttention, TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer

rng = np.random.default_rng(0)
def floats(*shape): return rng.standard_normal(shape).astype(np.float32)

class Attention(Module):
    def __init__(self): self.inner = MultiheadAttention(16, 2, batch_first=True)
    def forward(self, x): return self.inner(x, x, x)[0]

models = {f'gpt, {p} positions': (lambda p=p: GPT(GPTConfig(17, 16, 2, 2, 16, .1, positions=p)), [rng.integers(0, 17, (4,8))]) for p in ('learned','sinusoidal','rotary')}
models['encoder'] = lambda: TransformerEncoder(TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), [floats(4, 6, 16)]
models['decoder'] = lambda: TransformerDecoderLayer(16, 2, 32, batch_first=True, norm_first=True), [floats(4, 6, 16), floats(4, 3, 16)]
models['attention'] = Attention, [floats(4, 6, 16)]

@pytest.mark.parametrize('name', models)
def test_export(name, tmp_path):
    make,xs = models[name]
    model,names = make(),['x','memory'][:len(xs)]
    export_onnx(model, xs, tmp_path/'m.onnx', input_names=names, dynamic_axes={n:{0:'n'} for n in names})
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx')
    assert model.training
    model.eval()
    for n in (4,1,3):
        ours = model(*(Tensor(x[:n], requires_grad=False) for x in xs)).numpy()
        theirs, = session.run(None, {k:x[:n] for k,x in zip(names, xs)})
        assert theirs.shape==ours.shape and theirs.dtype==ours.dtype
        np.testing.assert_allclose(theirs, ours, atol=2e-5)

def test_names_are_kept():
    model = GPT(GPTConfig(17, 16, 1, 2, 16))
    kept = {i.name for i in export_onnx(model, rng.integers(0, 17, (2,8))).graph.initializer}
    learned = {n for n,_ in model.named_parameters()}
    assert kept & learned==learned - {'wpe.weight'} # whose first rows are a constant

def test_recurrence_is_refused_by_name():
    model = LSTM(3, 4)
    with pytest.raises(NotImplementedError, match='no rule for _LSTM'): export_onnx(lambda x: model(x)[0], floats(5, 2, 3))

@pytest.mark.parametrize('module, extra, call', [
    ('onnx', 'onnx', lambda path: export_onnx(Linear(2, 2), floats(1, 2), path/'m.onnx')),
    ('safetensors.numpy', 'safetensors', lambda path: save_model(Linear(2, 2), path/'m.safetensors')),
    ('safetensors.numpy', 'safetensors', lambda path: load_model(Linear(2, 2), path/'m.safetensors'))])
def test_missing_extra_is_named(module, extra, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'minima-dl\[{extra}\]'"): call(tmp_path)
    assert not list(tmp_path.iterdir())

def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    save({'w': np.ones(3)}, tmp_path/'w.npz')
    before = (tmp_path/'w.npz').read_bytes()
    def full(f, *args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('numpy.lib.format.write_array_header_1_0', full)
    with pytest.raises(OSError, match='No space'): save({'w': np.zeros(3)}, tmp_path/'w.npz')
    assert [f.name for f in tmp_path.iterdir()]==['w.npz'] and (tmp_path/'w.npz').read_bytes()==before
