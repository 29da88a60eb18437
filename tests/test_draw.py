"Graphs written for other tools, read by other people's parsers"
import html
from collections import namedtuple
from pathlib import Path
import pytest
from minima.draw import draw_graph, to_dot, to_mermaid
from minima.scalar import Scalar, exp, log
from test_site import needs_browser

root = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning') # pydot's, on its parser
mermaid = root/'.cache/node_modules/mermaid/dist/mermaid.min.js'
Node = namedtuple('Node', 'op inputs name', defaults=((),None))
hostile = ['"];evil -> n0;', 'a"b<br/>&lt;c>', '#35;', '1. x', '- x', '+', '*', '`*x*`', '__x__', 'end', '%% x', "it's; {x|y}", 'x.y[0]', 'ünï ∂', 'a\\b\\', '\\n\\N',
           'a:::b', '$$x$$', '<script>alert(1)</script>', 'style n0 fill:#f00', '1.5 (3, 4) x = y', 'x^2 ~ y ! ? @ |']

def example():
    x = Scalar(1., name='x')
    y = x*log(exp(x)+1)
    y.backward()
    return y

@pytest.fixture(scope='module')
def read_dot():
    pydot = pytest.importorskip('pydot')
    def read(text):
        graph, = pydot.graph_from_dot_data(text)
        nodes = [n for n in graph.get_nodes() if n.get_name() not in ('node', 'graph', '"\\n"')]
        return [html.unescape(n.get_label()[1:-1].replace('\\"', '"').replace('\\\\', '\\')) for n in nodes], len(graph.get_edges())
    return read

@pytest.mark.parametrize('name', hostile)
def test_dot_of_hostile_names(name, read_dot):
    assert read_dot(to_dot(Node(name, (Node(None, (), name),)))) == ([name]*2, 1)

def test_dot(read_dot):
    labels, edges = read_dot(to_dot(example()))
    assert labels[0]=='x\\n1\\n∂ 2.04' and len(labels)==edges==6
    labels, edges = read_dot(to_dot(example(), fold=lambda v: 'm' if v.op in ('exp','+') else None))
    assert 'm\\n2 nodes' in labels and (len(labels),edges)==(5,5)

@pytest.fixture(scope='module')
def read_mermaid(browser):
    if not mermaid.exists(): pytest.skip('npm install --prefix .cache mermaid')
    page = browser.new_page()
    page.set_content('<body></body>')
    page.add_script_tag(path=mermaid)
    page.evaluate('mermaid.initialize({startOnLoad: false})')
    return lambda text: page.evaluate('''async text => {
        const div = document.createElement('div')
        div.innerHTML = (await mermaid.render('m', text)).svg
        return [[...div.querySelectorAll('.nodeLabel')].map(e => e.textContent), div.querySelectorAll('.edgePaths path').length]
    }''', text)

@needs_browser
@pytest.mark.parametrize('name', hostile)
def test_mermaid_of_hostile_names(name, read_mermaid):
    assert read_mermaid(to_mermaid(Node(name, (Node(None, (), name),)))) == [[name]*2, 1]

@needs_browser
def test_mermaid(read_mermaid):
    labels, edges = read_mermaid(to_mermaid(example()))
    assert labels[0]=='x1∂ 2.04' and len(labels)==edges==6
    labels, edges = read_mermaid(to_mermaid(example(), max_nodes=2))
    assert labels[0]=='… 4 more' and len(labels)==3

@needs_browser
def test_picture_in_a_browser(browser):
    "Hostile names are text in HTML, where the rules are laxer than in XML"
    page = browser.new_page()
    for name in hostile:
        y = Node(name, (Node(None, (), name),))
        page.set_content(f'{draw_graph(y)}{draw_graph(y, fold=lambda v: name)}')
        assert page.evaluate('[...document.querySelectorAll("svg text")].map(e => e.textContent)')==[name, name, name, '2 nodes']
        assert page.evaluate('document.querySelectorAll("svg[role=img][aria-label]").length')==2
        assert page.evaluate('document.querySelectorAll("script").length')==0
