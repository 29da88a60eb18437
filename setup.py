"All metadata lives in settings.ini (nbdev's configuration); this only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    license='Apache-2.0', keywords=cfg['keywords'].split(),
    packages=find_packages(include=['minima', 'minima.*']), package_data={'minima': ['datasets/*']},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Intended Audience :: Education',
                 'Natural Language :: English', 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                 *(f'Programming Language :: Python :: 3.{i}' for i in range(10, 14))],
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'):v.split() for k,v in cfg.items() if k.endswith('_requirements')},
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['minima=minima._modidx:d']},
)
