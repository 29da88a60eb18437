"Open every page of the built site in headless Chromium; build the site first if a notebook is newer"
import fcntl, functools, html, http.server, json, re, shutil, subprocess, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
import pytest, yaml
from conftest import chromium

root = Path(__file__).parent.parent
docs = root/'_docs'
config = yaml.safe_load((root/'_quarto.yml').read_text())
parts = [(o['section'], o['contents']) if isinstance(o, dict) else (None, [o]) for o in config['website']['sidebar']['contents']]

def published(nb): return re.sub(r'^\d+[a-zA-Z0-9]*_', '', nb).lower().replace('.ipynb', '.html')
pages = [published(nb) for _,nbs in parts for nb in nbs]

needs_browser = pytest.mark.skipif(not chromium, reason='no Chromium here: apt-get install chromium, or name one in $CHROMIUM')

@pytest.fixture(scope='session')
def site():
    "The folder of the site, built if it is older than what it is built from"
    (root/'.cache').mkdir(exist_ok=True)
    with open(root/'.cache/site.lock', 'w') as lock: # processes of pytest-xdist wait for one another
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources = [*root.glob('nbs/*.ipynb'), *root.glob('minima/**/*.py'), root/'_quarto.yml', root/'nbs/styles.css', root/'tools/site.py']
        built = docs/'index.html'
        if not built.exists() or built.stat().st_mtime < max(f.stat().st_mtime for f in sources):
            if not shutil.which('npm') and not (root/'.cache/node_modules/katex').exists(): pytest.skip('KaTeX comes from npm, which is not installed here')
            res = subprocess.run([sys.executable, 'tools/site.py'], cwd=root, capture_output=True, text=True)
            assert res.returncode==0, res.stdout+res.stderr
    return docs

@pytest.fixture(scope='session')
def server(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site)) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{s.server_port}'
        s.shutdown()

class Watched:
    "A page, and what it complained of or asked from elsewhere"
    def __init__(self, browser, **kw):
        self.page, self.wrong = browser.new_context(**kw).new_page(), []
        self.page.set_default_timeout(10_000)
        self.page.on('console', lambda m: m.type in ('error', 'warning') and self.wrong.append(m.text))
        self.page.on('pageerror', lambda e: self.wrong.append(str(e)))
        self.page.on('requestfailed', lambda r: self.wrong.append(f'failed: {r.url}'))
        self.page.on('request', lambda r: re.match(r'http://127\.0\.0\.1:|file:|data:|blob:', r.url) or self.wrong.append(f'external: {r.url}'))
    def open(self, url):
        self.wrong.clear()
        self.page.goto(url)
        return self.page

@pytest.fixture(scope='session')
def wide(browser): return Watched(browser, viewport=dict(width=1400, height=900), color_scheme='light')
@pytest.fixture(scope='session')
def phone(browser): return Watched(browser, viewport=dict(width=390, height=800), color_scheme='dark')

# ---------------------------------------------------------------- without a browser

class Anchors(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.ids.add(attrs['id'])
        for k in ('href', 'src'):
            if attrs.get(k) is not None: self.links.append(attrs[k])

@pytest.fixture(scope='session')
def anchors(site): return {f.name: Anchors(f.read_text()) for f in site.glob('*.html')}

def test_pages(site):
    assert sorted(pages) == sorted(f.name for f in site.glob('*.html'))

@pytest.mark.parametrize('page', pages)
def test_links(page, anchors, site):
    for link in anchors[page].links:
        if re.match(r'https?://|data:|mailto:', link) or not link: continue
        path, _, anchor = link.partition('#')
        target = path.removeprefix('./') or page
        assert (site/unquote(target)).exists(), f'{page} links to {link}: no such file'
        if anchor and target.endswith('.html'): assert unquote(anchor) in anchors[target].ids, f'{page} links to {link}: no such anchor'

def test_order(site):
    "The sidebar has the parts of the book as sections; previous and next follow it"
    for i,page in enumerate(pages):
        text = (site/page).read_text()
        side = text[text.index('id="quarto-sidebar"'):text.index('id="quarto-sidebar-glass"')]
        assert re.findall(r'href="(?:\./)?([\w.-]+\.html)"', side) == pages
        for name,_ in parts: assert not name or html.escape(name) in side
        for way,j in (('previous', i-1), ('next', i+1)):
            link = re.search(rf'nav-page-{way}"><a href="(?:\./)?([\w.-]+)"', text)
            assert (link and link[1]) == (pages[j] if 0 <= j < len(pages) else None)

def test_source_is_shown(site):
    "The page of a module shows its classes' code and links to the repository"
    for nb in (nb for _,nbs in parts for nb in nbs):
        cells = [''.join(c['source']) for c in json.loads((root/'nbs'/nb).read_text())['cells']]
        names = [n for c in cells if re.match(r'#\|\s*exports\b', c) for n in re.findall(r'^(?:class|def) ([A-Za-z]\w*)', c, re.M)]
        text = (site/published(nb)).read_text()
        plain = html.unescape(re.sub(r'<[^>]+>', '', text))
        for n in names: assert re.search(rf'(class|def) {n}\b', plain), f'{nb}: the code of {n} is not on the page'
        if names: assert re.search(r'href="https://[^"]+/blob/[^"]+\.py#L\d+"', text), f'{nb}: no link to the source'

# ---------------------------------------------------------------- in a browser

raw_math = r'''() => {
    const body = document.querySelector('main').cloneNode(true)
    body.querySelectorAll('pre, code, script, style, .katex').forEach(e => e.remove())
    return { raw: body.textContent.match(/.{0,40}(\$\$|\\begin|\\\(|\\\[|\{#eq-|@(eq|fig)-).{0,40}/)?.[0] ?? '',
             unset: [...document.querySelectorAll('main .math')].filter(e => !e.querySelector('.katex')).map(e => e.textContent),
             errors: [...document.querySelectorAll('.katex-error')].map(e => e.title) }
}'''

contrast = r'''() => { // every text on what is behind it: WCAG's ratio
    const rgb = s => (s.match(/[\d.]+/g) ?? [0,0,0,0]).map(Number).map((x,i) => s.startsWith('color(') && i<3 ? 255*x : x)
    const over = ([r,g,b,a=1], under) => [r,g,b].map((x,i) => a*x + (1-a)*under[i])
    const lum = c => { const [r,g,b] = c.map(x => (x /= 255) <= .03928 ? x/12.92 : ((x+.055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b }
    const back = e => e ? over(rgb(getComputedStyle(e).backgroundColor), back(e.parentElement)) : [255,255,255]
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), poor = new Set()
    for (let n; n = walker.nextNode();) {
        const e = n.parentElement
        if (!n.data.trim() || e.closest('svg, script, style, .katex-mathml') || !e.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue
        let alpha = 1
        for (let a = e; a; a = a.parentElement) alpha *= getComputedStyle(a).opacity
        const b = back(e), [r,g,bl,a=1] = rgb(getComputedStyle(e).color), [x,y] = [lum(over([r,g,bl,a*alpha], b)), lum(b)].sort((p,q) => q-p)
        if ((x+.05)/(y+.05) < 4.5) poor.add(`${((x+.05)/(y+.05)).toFixed(1)} ${e.tagName}.${e.className}: ${n.data.trim().slice(0,30)}`)
    }
    return [...poor].slice(0,8)
}'''

too_wide = r'''() => { // whatever reaches over the edge of the screen stands in a box that scrolls
    const scrolls = e => e && e.tagName !== 'BODY' && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement))
    const w = document.documentElement
    return [...(w.scrollWidth > innerWidth ? [`the page is ${w.scrollWidth} wide`] : []),
            ...[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth+1 && !scrolls(e.parentElement) && !e.closest('.katex-mathml') && !e.ownerSVGElement)
                .map(e => `${e.tagName}.${e.className} ${e.textContent.slice(0,40)}`)].slice(0,5)
}'''

cut_plots = r'''() => [...document.querySelectorAll('.cell-output svg')].filter(e => /^(lines|curve)/.test(e.getAttribute('aria-label')) && e.getBoundingClientRect().right > innerWidth).map(e => e.getAttribute('aria-label'))'''

@needs_browser
@pytest.mark.parametrize('page', pages)
def test_page(page, server, wide, phone):
    p = wide.open(f'{server}/{page}')
    assert p.title() and p.locator('main h1').count()
    assert p.evaluate(raw_math) == dict(raw='', unset=[], errors=[])
    assert p.evaluate(contrast) == [], 'light'
    assert wide.wrong == []
    p = phone.open(f'{server}/{page}')
    assert p.evaluate(too_wide) == [], 'at 390 px'
    assert p.evaluate(cut_plots) == [], 'a plot is seen whole at 390 px'
    assert p.evaluate('document.documentElement.classList.contains("quarto-dark")')
    assert p.evaluate(contrast) == [], 'dark'
    assert phone.wrong == []

def symbols():
    from minima._modidx import d
    names = [s.removeprefix(f'{m}.') for m,o in d['syms'].items() if '.ops.' in m for s in o]
    return [n for n in ('logsumexp', 'EWiseDiv', 'MatMul', 'BroadcastTo') if n in names]

@needs_browser
@pytest.mark.parametrize('name', symbols())
def test_search(name, server, wide):
    p = wide.open(f'{server}/index.html')
    p.fill('#quarto-search input', name)
    hit = p.locator('.search-result').first
    hit.wait_for()
    assert hit.locator('.search-result-section').inner_text().lower()==name.lower()
    hit.click()
    p.wait_for_url(f'**#{name.lower()}*')
    assert wide.wrong == []

@needs_browser
def test_dark_mode_toggles(server, browser):
    w = Watched(browser, color_scheme='light')
    p = w.open(f'{server}/{pages[-1]}')
    def dark(): return p.evaluate('''["body", "#quarto-sidebar", ".navbar", "main pre"].map(s => getComputedStyle(document.querySelector(s)))
        .map(c => c.backgroundColor+c.color)''')
    light = dark()
    p.click('.quarto-color-scheme-toggle')
    p.wait_for_selector('html.quarto-dark')
    assert all(a!=b for a,b in zip(light, dark()))
    p.goto(f'{server}/{pages[0]}')
    assert p.locator('html.quarto-dark').count(), 'the choice holds on the next page'
    p.click('.quarto-color-scheme-toggle')
    p.wait_for_selector('html:not(.quarto-dark)')

@needs_browser
def test_from_disk(site, browser):
    "Opened from the file system everything but search works"
    w = Watched(browser)
    page = next(p for p in pages if 'class="math' in (site/p).read_text())
    p = w.open((site/page).as_uri())
    assert p.evaluate(raw_math) == dict(raw='', unset=[], errors=[])
    assert p.evaluate('getComputedStyle(document.body).fontFamily').count('serif')
    p.click('.nav-page a >> nth=-1')
    p.wait_for_url(lambda url: url!=(site/page).as_uri())
    p.locator('main h1').first.wait_for() # the page has been asked for, and may not have come
    assert p.url.startswith('file:')
    assert w.wrong == []

@needs_browser
def test_print(server, browser):
    p = Watched(browser, color_scheme='dark').open(f'{server}/{pages[-1]}')
    p.emulate_media(media='print')
    for s in ('#quarto-header', '#quarto-sidebar', '.page-navigation'): assert not p.locator(s).first.is_visible()
    assert p.evaluate('getComputedStyle(document.body).backgroundColor')=='rgb(255, 255, 255)' and p.evaluate(contrast)==[]
