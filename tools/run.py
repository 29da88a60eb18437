"Execute notebooks in place, so that the site shows stored outputs: python tools/run.py nbs/11_elementwise.ipynb"
import re, sys
from pathlib import Path
from execnb.shell import CaptureShell

def skip(cell): return cell.cell_type!='code' or bool(re.search(r'^#\|\s*eval:\s*false', cell.source, re.M)) or 'nbdev_export()' in cell.source

for f in sys.argv[1:]: CaptureShell(path=Path(f).parent).execute(f, f, exc_stop=True, preproc=skip)
