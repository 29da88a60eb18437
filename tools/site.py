"Build the site into _docs without Quarto: notebooks -> nbdev's processing -> smalldocs, KaTeX inside. python tools/site.py [--katex DIST]"
import argparse, ast, json, os, re, shutil, subprocess, sys, time
from pathlib import Path
import yaml
from nbdev.config import get_config
from nbdev.doclinks import patch_name
from nbdev.serve import proc_nbs

KATEX = '0.16.47'
def published(nb): return re.sub(r'^\d+[a-zA-Z0-9]*_', '', nb).lower().removesuffix('.ipynb') # nbdev's rule: 03_tensor.ipynb becomes tensor.html
def text(x): return ''.join(x) # a notebook stores text as a string or as a list of lines

def listed(o):
    "Notebooks named anywhere in a sidebar or navbar, in order"
    if isinstance(o, dict): o = [o.get('href'), o.get('contents')]
    return [p for x in o or [] for p in listed(x)] if not isinstance(o, str) else [o]*o.endswith('.ipynb')

def check_pages(config, nbs):
    "Stop with a message unless the sidebar lists every notebook once, and nothing else"
    web = yaml.safe_load(config.read_text())['website']
    side, have = listed(web['sidebar']), {f.name for f in nbs.glob('[!_.]*.ipynb')}
    wrong  = [f'{config.name} lists {p}, but nbs/{p} does not exist' for p in dict.fromkeys(side+listed(web['navbar'].get('left'))) if p not in have]
    wrong += [f'nbs/{p} stands {side.count(p)} times in the sidebar of {config.name}' for p in sorted(have) if side.count(p)!=1]
    names = [published(p) for p in sorted(have)]
    wrong += [f'two notebooks are published as {n}.html: rename one' for n in {n for n in names if names.count(n)>1}]
    if wrong: sys.exit('\n'.join(wrong))

def get_katex(cache):
    "KaTeX from npm, once"
    package = cache/'node_modules/katex/package.json'
    if not package.exists() or json.loads(package.read_text())['version'] != KATEX:
        cache.mkdir(exist_ok=True)
        subprocess.run(['npm', 'install', '--silent', '--no-audit', '--no-fund', '--prefix', str(cache), f'katex@{KATEX}'], check=True)
    return package.parent/'dist'

# What nbdev says of a symbol: a rule, a link to the source, a heading, the signature, the docstring
shown = re.compile(r'---\n\n(?P<link>\[source\].*)?\n*### (?P<name>.*)\n\n```python\n+(?P<code>(?:.*\n)*?)```(?P<doc>(?:.|\n)*)')

def defined(code):
    "The symbols of a cell that nbdev documents, in order"
    defs = [patch_name(o) for o in ast.parse(code).body if isinstance(o, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    return [n for d in defs for n in ([d] if isinstance(d, str) else d)]

def words(symbols, source_follows):
    "The same for all symbols of a cell: one heading, what the docstrings say, and the signature unless the source has it"
    names, docs = [m['name'] for m in symbols], [m['doc'].strip().replace('*Call self as a function.*', '') for m in symbols]
    head = f"---\n\n{symbols[0]['link'] or ''}"
    if len(names)>1: # the docstrings are in the source too, but only here are formulas set
        return '\n\n'.join([head+''.join(f'<span id="{n.lower()}"></span>' for n in names), '### '+', '.join(names), *(f'`{n}` {d}' for n,d in zip(names, docs) if '$' in d)])
    code = re.sub(r'^def ([A-Z])', r'class \1', symbols[0]['code']).replace(')->', ') -> ')
    return '\n\n'.join([head, f'### {names[0]}', docs[0], '' if source_follows else f'```python\n{code}```'])

def fix_shown(cells):
    "Words on symbols stand before their source, or where nbdev put them if the source is not on the page"
    source_of, told = {}, {}
    said = [next((m for o in c.get('outputs', []) if (m := shown.match(text(o.get('data', {}).get('text/markdown', ''))))), None) for c in cells]
    for i,c in enumerate(cells):
        if not c['source'].startswith('#| code-fold: show'): continue
        c['source'] = re.sub(r'^#\| code-(fold|summary):.*\n', '', c['source'], flags=re.M)
        source_of |= dict.fromkeys(defined(c['source']), i)
    for i,m in enumerate(said):
        if m: told.setdefault(source_of.get(m['name'], i), []).append(m)
    for i,c in enumerate(cells):
        if i in told:
            symbols = sorted(told[i], key=lambda m: [*source_of, m['name']].index(m['name']))
            data = {'text/markdown': words(symbols, not said[i])}
            yield dict(cell_type='code', metadata={}, source='#| echo: false', outputs=[dict(output_type='display_data', metadata={}, data=data)])
        if not said[i]: yield c

def fix_markdown(s, base):
    "Outside fenced code: nbdev's absolute links and links to notebooks become links within the site, dunders in headings stay"
    def fix(s):
        s = re.sub(r'\[\[(`[^`]+`)\]\([^)]*\)\]', r'[\1]', s).replace(base, '') # nbdev has put a link into a link
        s = re.sub(r'\]\((?:\./)?([\w.-]+)\.ipynb', lambda m: f']({published(m[1])}.html', s)
        return re.sub(r'^(#+ .*)$', lambda m: m[1].replace('__', r'\_\_'), s, flags=re.M)
    return ''.join(p if i%2 else fix(p) for i,p in enumerate(re.split(r'(^```.*?^```[ \t]*$)', s, flags=re.S|re.M)))

def fix_notebook(f, base):
    "What smalldocs does not do of what Quarto does, and one heading in place of nbdev's repetitions"
    nb = json.loads(f.read_text())
    for c in nb['cells']: c['source'] = text(c['source'])
    nb['cells'] = [*fix_shown(nb['cells'])]
    for c in nb['cells']:
        if c['cell_type']=='markdown': c['source'] = fix_markdown(c['source'], base)
        for o in c.get('outputs', []):
            if md := text(o.get('data', {}).get('text/markdown', '')): o['data']['text/markdown'] = fix_markdown(md, base)
    f.unlink()
    f.with_name(published(f.name)+'.ipynb').write_text(json.dumps(nb))

def fix_links(out):
    "A link to a method that has no heading of its own goes to its class, else to the top of the page"
    pages = {f.name: f.read_text() for f in out.glob('*.html')}
    ids = {name: set(re.findall(r'\bid="([^"]+)"', s)) for name,s in pages.items()}
    for name,s in pages.items():
        def link(m):
            page, anchor = m[1] or name, m[2]
            while page in ids and anchor and anchor not in ids[page]: anchor = anchor.rpartition('.')[0]
            return f'href="{m[1]}#{anchor}"'
        (out/name).write_text(re.sub(r'href="([\w.-]*\.html|)#([^"]*)"', link, s))

def build(katex=None):
    import smalldocs.layout, smalldocs.site
    start, c = time.time(), get_config()
    out, libs = c.doc_path, c.doc_path/'site_libs'
    check_pages(c.config_path/'_quarto.yml', c.nbs_path)
    katex = Path(katex) if katex else get_katex(c.config_path/'.cache')
    os.environ['PYTHONPATH'] = str(c.config_path) # for nbdev's workers
    proc = proc_nbs(str(c.nbs_path), n_workers=os.cpu_count(), force=True)
    for f in proc.glob('*.ipynb'): fix_notebook(f, f'{c.doc_host}{c.doc_baseurl}/')
    config = proc/'_quarto.yml'
    config.write_text(re.sub(r'[\w.-]+\.ipynb', lambda m: published(m[0])+'.ipynb', config.read_text()))
    smalldocs.layout.KATEX = 'site_libs/katex'
    site = smalldocs.site.build(proc, quiet=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(proc/'_docs', out)
    shutil.rmtree(proc)
    for f in [katex/'katex.min.css', katex/'katex.min.js', katex/'contrib/auto-render.min.js', *katex.glob('fonts/*.woff2')]:
        os.makedirs((to := libs/'katex'/f.relative_to(katex)).parent, exist_ok=True)
        shutil.copy(f, to)
    for f in libs.rglob('*.css'): f.write_text(re.sub(r'@import url\([^)]*\);?', '', f.read_text())) # web fonts of the themes
    fix_links(out)
    for w in site.warnings:
        if not re.search('output-file is not read|html-math-method is ignored', w): print('warning:', w) # both are for Quarto
    print(f'{len(site.pages)} pages in {out.name}/ after {time.time()-start:.0f} s')

if __name__=='__main__': # nbdev's workers import this file
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--katex', help='dist folder of a KaTeX that is here already; without it, npm gets one into .cache/')
    build(p.parse_args().katex)
