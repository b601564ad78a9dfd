"""JupyterLab as its users have it: a server on loopback, Chromium without a window, a notebook in it.

- Nothing leaves the machine: no news, no look for updates, no extension manager, no browser or driver fetched. All that
  Jupyter and Chromium write goes into one folder.
- Notebooks are told to render every cell, since by default an output outside the window is not in the page.
- JupyterLab's own commands open notebooks and run cells (`--expose-app-in-browser`, as its own tests do); widgets are
  moved by mouse and keys.
- Every wait has an end, and says what it waited for.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parent.parent
SCREENSHOTS = os.environ.get("LLMQ_SCREENSHOTS")
WAIT_SECONDS = 60
POLL_SECONDS = 0.05
WIDTH, HEIGHT, AROUND = 1280, 1160, 440
"""Pixels of Chromium's window, and of what is there around a cell's output."""

SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"doNotDisturbMode": True},
    "@jupyterlab/apputils-extension:themes": {"theme": "JupyterLab Light", "adaptive-theme": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    "@jupyterlab/completer-extension:manager": {"autoCompletion": False},
}
DISABLED = ("@jupyterlab/apputils-extension:announcements", "@jupyterlab/extensionmanager-extension")
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--force-device-scale-factor=1",
    f"--window-size={WIDTH},{HEIGHT}",
)
RUN_COMMAND = """
const [command, done] = arguments;
window.jupyterapp.commands.execute(command).then(() => done(null), error => done(String(error)));
"""
NEW_CELL = """
const [source, done] = arguments;
const {content} = window.jupyterapp.shell.currentWidget;
content.activeCellIndex = content.widgets.length - 1;
window.jupyterapp.commands.execute('notebook:insert-cell-below').then(() => {
  content.activeCell.model.sharedModel.setSource(source);
  return window.jupyterapp.commands.execute('notebook:run-cell');
}).then(() => done(content.activeCell.node), error => done(null));
"""
ERRORS = """
return window.jupyterapp.shell.currentWidget.content.widgets
  .flatMap(cell => cell.model.outputs?.toJSON() ?? [])
  .filter(output => output.output_type === 'error')
  .map(output => output.traceback.join('\\n').replace(/\\x1b\\[[0-9;]*m/g, ''));
"""
IS_READY = """
const widget = window.jupyterapp?.shell?.currentWidget;
const kernel = widget?.sessionContext?.session?.kernel;
return Boolean(widget?.context?.isReady && kernel?.status === 'idle' && !document.querySelector('#jupyterlab-splash'));
"""


def wait_until(what, check, seconds=WAIT_SECONDS):
    """What `check` returns as soon as that is true, but for `seconds` at most."""
    ends_at = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < ends_at, f"{what}: not within {seconds} s"
        time.sleep(POLL_SECONDS)
    return found


@contextmanager
def jupyter_lab(folder):
    """The address of a JupyterLab, with its token as `?token=`; its notebooks are in `folder/notebooks`."""
    _write_json(folder / "settings" / "overrides.json", SETTINGS)
    page_config = {"disabledExtensions": dict.fromkeys(DISABLED, True)}
    _write_json(folder / "jupyter_config_dir" / "labconfig" / "page_config.json", page_config)
    (folder / "notebooks").mkdir()
    token, port = secrets.token_hex(), _free_port()
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "ServerApp.root_dir": folder / "notebooks",
        "IdentityProvider.token": token,
        "LabApp.app_settings_dir": folder / "settings",
        "LabApp.extension_manager": "readonly",
        "LabApp.expose_app_in_browser": True,
    }
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())],
            env={**os.environ, **_folders(folder), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until(f"JupyterLab (its log: {folder / 'log'})", lambda: _answers(server, address, token))
        yield f"{address}/lab/tree/%s?token={token}"
    finally:
        _end(server)


def _end(server):
    """Its kernels first, which it does itself if it still can."""
    server.terminate()
    try:
        server.wait(WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _write_json(path, content):
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))


def _folders(folder):
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    lab = ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    return {name: str(folder / name.lower()) for name in (*names, *lab)}


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(server, address, token):
    assert server.poll() is None, "JupyterLab has ended"
    request = urllib.request.Request(f"{address}/api/status", headers={"Authorization": f"token {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextmanager
def chromium(folder):
    """A selenium driver of Debian's Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={folder / 'chromium'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_script_timeout(2 * WAIT_SECONDS)
        # JupyterLab's current widget is what has the focus, and a headless window need not have it.
        driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
        yield driver
    finally:
        driver.quit()


class Notebook:
    """A notebook open in JupyterLab."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.wait("the notebook and its kernel", lambda: driver.execute_script(IS_READY))
        self.command("application:toggle-left-area")

    def wait(self, what, check, seconds=WAIT_SECONDS):
        """What `check()` returns as soon as that is true; elements may come and go while it looks."""
        wait = WebDriverWait(
            self.driver, seconds, POLL_SECONDS, [NoSuchElementException, StaleElementReferenceException]
        )
        try:
            return wait.until(lambda _: check(), what)
        except TimeoutException as error:
            page = self.driver.find_element(By.TAG_NAME, "body").text
            raise AssertionError(f"{what}: not within {seconds} s. The page shows:\n{page}") from error

    def command(self, name):
        """Execute one of JupyterLab's commands, to its end."""
        error = self.driver.execute_async_script(RUN_COMMAND, name)
        assert error is None, f"{name}: {error}"

    def run_all(self):
        """Run every cell, to the end; none may end in an error."""
        self.command("notebook:run-all-cells")
        self._no_error()

    def run(self, source):
        """Add a cell at the end and run it, to its end; returns the cell's element."""
        cell = self.driver.execute_async_script(NEW_CELL, source)
        assert cell is not None, "the cell could not be run"
        self._no_error()
        return cell

    def _no_error(self):
        errors = self.driver.execute_script(ERRORS)
        assert not errors, errors[0]

    def find(self, selector, text="", within=None):
        """The first element with that text that is shown, once one is; in `within`, else anywhere in the notebook."""

        def shown():
            found = (within or self.driver.find_element(By.CSS_SELECTOR, ".jp-Notebook")).find_elements(
                By.CSS_SELECTOR, selector
            )
            return next((each for each in found if each.is_displayed() and text in each.text), None)

        return self.wait(f"{selector} with the text {text!r}", shown)

    def button(self, label, within=None):
        """The widget's button of that label, in view and ready to be clicked."""
        return self.in_view(self.find("button.jupyter-button:enabled", label, within))

    def output(self, cell):
        """All that a cell shows below its source."""
        return self.find(".jp-Cell-outputArea", within=cell)

    def in_view(self, element, block="center"):
        """The element, scrolled to the middle of the window, or to its `end`."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: arguments[1]})", element, block)
        return element

    def screenshot(self, name, element):
        """The element and what is above it, for the docs; only if LLMQ_SCREENSHOTS names a folder."""
        if SCREENSHOTS:
            self.driver.set_window_size(WIDTH, max(HEIGHT, element.size["height"] + AROUND))
            self.in_view(element, "end")
            assert self.driver.save_screenshot(str(ROOT / SCREENSHOTS / f"{name}.png"))
            self.driver.set_window_size(WIDTH, HEIGHT)
