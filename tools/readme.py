"Write README.md from nbs/index.ipynb without Quarto: python tools/readme.py"
import base64, re
from pathlib import Path
from execnb.nbio import read_nb
from nbdev.config import get_config

def text(x): return ''.join(x)
def fenced(code, lang): return f'```{lang}\n{code.strip()}\n```'

ink = '<style>:root{color:#1f2328}@media(prefers-color-scheme:dark){:root{color:#d1d7e0}}</style>' # what `currentColor` is in a file

def image(data, stem):
    "File name and bytes of a picture"
    if 'image/svg+xml' in data: return f'{stem}.svg', re.sub(r'<svg[^>]*>', lambda m: m[0]+ink, text(data['image/svg+xml']), count=1).encode()
    return f'{stem}.png', base64.b64decode(text(data['image/png']))

def readme(nb, folder=Path('assets/readme')):
    "Markdown of a notebook, and the files it shows: {path: bytes}"
    parts, files = [], {}
    for c in read_nb(nb).cells:
        if c.cell_type=='markdown': parts.append(re.sub(r'\]\((?=[\w-]+\.ipynb)', '](nbs/', c.source.strip()))
        if c.cell_type!='code' or re.search(r'^#\|\s*(hide|default_exp|include:\s*false)', c.source, re.M): continue
        code = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
        if code and not re.search(r'^#\|\s*echo:\s*false', c.source, re.M): parts.append(fenced(code, 'python'))
        for o in c.get('outputs', []):
            data = o.get('data', {})
            if 'text' in o: parts.append(fenced(text(o['text']), 'text'))
            elif 'text/markdown' in data: parts.append(text(data['text/markdown']).strip())
            elif 'image/svg+xml' in data or 'image/png' in data:
                name, content = image(data, f'{Path(nb).stem}-{len(files)+1}')
                files[folder/name] = content
                parts.append(f'![]({(folder/name).as_posix()})')
            elif 'text/plain' in data: parts.append(fenced(text(data['text/plain']), 'text'))
    return '\n\n'.join(parts)+'\n', files

if __name__=='__main__':
    c = get_config()
    md, files = readme(c.nbs_path/'index.ipynb')
    for f in (c.config_path/'assets/readme').glob('*.*'): f.unlink()
    for f,content in files.items():
        (c.config_path/f).parent.mkdir(parents=True, exist_ok=True)
        (c.config_path/f).write_bytes(content)
    (c.config_path/'README.md').write_text(md)
