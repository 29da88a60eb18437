"What holds for the project as a whole: notebooks depend downwards, importing is quick, the README is true, the wheel works alone"
import ast, builtins, dis, importlib, json, os, re, statistics, subprocess, sys, types, venv
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
notebooks = {f.stem: json.loads(f.read_text())['cells'] for f in sorted((root/'nbs').glob('[!_.]*.ipynb'))}
modules = sorted((root/'minima').rglob('*.py'))
sys.path.insert(0, str(root/'tools'))

def source(cell): return ''.join(cell['source'])
def number(nb): return int(nb[:2]) if nb[:2].isdigit() else 1000 # index stands on everything
def exported(cell): return re.search(r'^#\|\s*exports?i?\b', source(cell), re.M)
def run(*args, **kw): return subprocess.run([str(a) for a in args], capture_output=True, text=True, **kw)

home = {f'minima.{m[1]}': nb for nb,cells in notebooks.items() for c in cells if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M))}

def imports(code):
    "Modules of minima that a piece of code imports; `minima` for the package itself"
    code = re.sub(r'^(\s*)[%!].*', r'\1pass', code, flags=re.M) # magics
    for o in ast.walk(ast.parse(code)):
        if isinstance(o, ast.Import): yield from (a.name for a in o.names if a.name.split('.')[0]=='minima')
        if isinstance(o, ast.ImportFrom) and not o.level and o.module.split('.')[0]=='minima':
            if o.module in home: yield o.module
            else: yield from (name if (name := f'{o.module}.{a.name}') in home else o.module for a in o.names)

@pytest.mark.parametrize('nb', notebooks)
def test_imports_go_down(nb):
    for c in notebooks[nb]:
        if c['cell_type']!='code' or re.match(r'%%(?!time)', source(c)): continue
        for m in imports(source(c)):
            if m in ('minima', 'minima.ops'): assert not exported(c), f'{nb} exports `import {m}`: name the module it needs'
            else:
                assert m in home, f'{nb} imports {m}, which no notebook exports'
                assert number(home[m]) < number(nb) or (nb, m)==('19_operators', 'minima.compile'), f'{nb} imports {m}, which is made later or in the same place: {home[m]}' # its table has a column for the compiler

@pytest.mark.parametrize('file', modules, ids=lambda f: f.stem)
def test_no_module_imports_the_package(file):
    package = ['minima', *file.relative_to(root/'minima').parts[:-1]]
    for o in ast.walk(ast.parse(file.read_text())):
        if isinstance(o, ast.Import): assert not any(a.name=='minima' for a in o.names), f'{file.name}:{o.lineno} has `import minima`'
        if isinstance(o, ast.ImportFrom):
            base = package[:len(package)-o.level+1] if o.level else []
            full = '.'.join([*base, *([o.module] if o.module else [])])
            assert full not in ('minima', 'minima.ops'), f'{file.name}:{o.lineno} imports from {full}, which is everything: name the module'

@pytest.mark.parametrize('nb', notebooks)
def test_notebook_is_presentable(nb):
    cells = notebooks[nb]
    first = next(source(c) for c in cells if c['cell_type']=='markdown')
    assert re.match(r'# \S.*\n\n> \S', first), f'{nb} begins with a title, and one line that says what it is about'
    outputs = [o for c in cells for o in c.get('outputs', [])]
    assert outputs, f'{nb} has no stored outputs: python tools/run.py nbs/{nb}.ipynb'
    assert not [o for o in outputs if o['output_type']=='error']

@pytest.mark.parametrize('file', modules, ids=lambda f: f.stem)
def test_every_name_is_there(file):
    "A notebook may have imported for its examples what the module forgets"
    name = '.'.join(['minima', *file.relative_to(root/'minima').with_suffix('').parts]).removesuffix('.__init__')
    known,codes = {*vars(importlib.import_module(name)), *vars(builtins)},[compile(file.read_text(), file.name, 'exec')]
    for c in codes:
        codes += [k for k in c.co_consts if isinstance(k, types.CodeType)]
        missing = {i.argval for i in dis.get_instructions(c) if i.opname=='LOAD_GLOBAL'} - known
        assert not missing, f'{file.name}, {c.co_name}: {missing}'

# ---------------------------------------------------------------- import

def python(code, **env):
    "Run code in a process of its own, with bytecode, outside the project"
    env = {k:v for k,v in os.environ.items() if k not in ('PYTHONDONTWRITEBYTECODE', 'IN_TEST')} | {'PYTHONPATH': str(root)} | env
    res = run(sys.executable, '-c', code, cwd='/', env=env)
    assert res.returncode==0, res.stderr
    return res.stdout

def test_import_is_light():
    loaded = python('import minima, sys; print(*sys.modules)').split()
    assert not {'torch', 'matplotlib', 'IPython'} & set(loaded)

def seconds(module): return float(python(f'from time import perf_counter as t; a=t(); import {module}; print(t()-a)'))

def test_import_is_quick():
    "At most half as long again as NumPy's own import; noise gets three chances"
    seconds('minima'), seconds('numpy') # write the bytecode
    for _ in range(3):
        ours, numpys = zip(*((seconds('minima'), seconds('numpy')) for _ in range(15)))
        if (ratio := statistics.median(ours)/statistics.median(numpys)) <= 1.5: return
    pytest.fail(f'import minima takes {ratio:.2f} times import numpy')

# ---------------------------------------------------------------- README and wheel

def program():
    "The README's first program"
    blocks = re.findall(r'^```python\n(.*?)^```', (root/'README.md').read_text(), re.S|re.M)
    return next(b for b in blocks if 'import' in b)

def test_readme_is_the_index():
    import readme
    text, files = readme.readme(root/'nbs/index.ipynb')
    assert (root/'README.md').read_text()==text, 'python tools/readme.py'
    assert {f.relative_to(root): f.read_bytes() for f in (root/'assets/readme').glob('*.*')}==files, 'python tools/readme.py'

def test_readme_program(tmp_path):
    res = run(sys.executable, '-c', program(), cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(root)})
    assert res.returncode==0, res.stderr

def test_wheel_works_alone(tmp_path):
    "sdist, wheel from it, installed in an environment with nothing else, away from the project"
    built = run(sys.executable, '-m', 'build', '--outdir', tmp_path, root)
    assert built.returncode==0, built.stdout+built.stderr
    wheel, = tmp_path.glob('*.whl')
    assert len([*tmp_path.glob('*.tar.gz')])==1
    venv.create(tmp_path/'env', with_pip=True)
    bin = tmp_path/'env'/('Scripts' if os.name=='nt' else 'bin')
    env = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'}
    installed = run(bin/'python', '-m', 'pip', 'install', '--quiet', wheel, env=env)
    assert installed.returncode==0, installed.stderr
    helped = run(bin/'minima', '--help', cwd=tmp_path, env=env)
    assert helped.returncode==0 and 'usage' in helped.stdout.lower(), helped.stdout+helped.stderr
    trained = run(bin/'python', '-c', program(), cwd=tmp_path, env=env)
    assert trained.returncode==0, trained.stderr
