"Set before anything is imported: matplotlib draws to no screen. The browser, of which there is one for all tests"
import os, shutil
import pytest
os.environ['MPLBACKEND'] = 'Agg'

browsers = [os.environ.get('CHROMIUM', ''), 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable']
chromium = next(filter(None, map(shutil.which, filter(None, browsers))), None)

@pytest.fixture(scope='session')
def browser():
    from playwright.sync_api import sync_playwright
    args = '--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --disable-component-update --no-first-run'.split()
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=args)
        yield b
        b.close()
