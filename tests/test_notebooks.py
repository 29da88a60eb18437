"Rerun every notebook by nbdev's own runner, each as if it were the first that this process has seen"
import sys
from pathlib import Path
import pytest
from nbdev.test import test_nb as run_nb

root = Path(__file__).parent.parent
notebooks = sorted((root/'nbs').glob('[!_.]*.ipynb'))

def pop_modules(name):
    return {k:sys.modules.pop(k) for k in list(sys.modules) if k.partition('.')[0]==name}

@pytest.fixture
def fresh(monkeypatch):
    "`minima` is imported anew, and what a notebook patches into it is gone afterwards"
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setenv('IN_TEST', '1') # the runner sets it, and never unsets it
    kept = pop_modules('minima')
    yield
    pop_modules('minima')
    sys.modules.update(kept)

@pytest.mark.parametrize('nb', notebooks, ids=lambda p: p.stem)
def test_notebook(nb, fresh, capfd):
    passed,_ = run_nb(nb, skip_flags=['slow'], basepath=root)
    if not passed: pytest.fail(capfd.readouterr().err, pytrace=False)
