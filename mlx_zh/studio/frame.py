"""The frame around every page: header, navigation, language and theme, and the table of pages.

For the author of a page:

- A page is `def NAME_page(studio: Studio) -> None`, or async, in `studio/pages/NAME.py`. It is named in `PAGES` below
  as "NAME:NAME_page" and imported on its first visit, so it may import what it needs. It draws with `nicegui.ui` and
  the parts in `widgets`; the frame is around it already.
- `studio.query` holds the address's parameters. `?run=KEY` names a run: `studio.run(studio.query.get("run", ""))` is
  its RunInfo (`stages/run_list.py`), whose `.folder` is the RunFolder. `address("/run", run=key)` makes such links.
  An MlxZhError that the builder raises is shown as a card, one that a button's handler raises as a notification.
  Paths never go into an address, and none come from one.
- `studio.say("Best loss")` words a text, fields by name: `studio.say("{count} runs", count=3)`. Each needs a line
  in `language/studio.yaml` (a test compares). Texts that are said later are marked: `worded("Best loss")`. Errors and
  notices of lower layers: `studio.error(error)`. Both return plain text.
- Text from a model, a file, a run name or a recipe goes into `ui.label`, `widgets.code`, a table's cells or a chart's
  names: never into `ui.html`, `ui.add_head_html`, `ui.run_javascript`, `props(…)` strings, a table's `v-html`,
  or an ECharts `formatter`. `ui.markdown` only with its default sanitizing.
- What takes more than 50 ms goes through `await run.io_bound(…)` or a process. The answer must not wait for it: draw
  the page, then fill it in `ui.timer(0, fill, once=True)`. `widgets.while_visible(1.0, refresh)` polls while seen.
- There is no Tailwind. Classes are in `studio.css` (z-row, z-card, z-grid, z-note …) and Quasar's (`q-mt-md`). The
  Content-Security-Policy refuses other hosts, frames, forms and inline scripts. Only `app.storage.client` is there
  of NiceGUI's storage; a choice that lasts goes into a file of this program, or a cookie.
- `ui.echart` through `widgets.chart` and `widgets.draw`, which thin a curve to what can be seen.
- Tests: `tests/studio/conftest.py` has `studio_at(folder)`, a studio in a process of its own, and `browser_page`, a
  Chromium page that fails the test on any console error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import urlencode

from fastapi import Request
from nicegui import context, ui
from nicegui.page import page as Route

from mlx_zh.errors import MlxZhError
from mlx_zh.language.catalogue import Language
from mlx_zh.studio import widgets
from mlx_zh.studio.projects import LANGUAGE_COOKIE, THEME_COOKIE, Projects, Studio, language_of
from mlx_zh.studio.safety import ASKING
from mlx_zh.studio.texts import worded
from mlx_zh.system import crashes
from mlx_zh.system.redaction import hide


class Page(NamedTuple):
    """A page. `builder` is "MODULE:FUNCTION" in `studio/pages`; one without an icon is not in the navigation.

    A page `of_run` is about the run of its address, and the navigation stays with that run.
    """

    path: str
    title: str
    builder: str
    icon: str = ""
    of_run: bool = False


PAGES = (
    Page("/", worded("Runs"), "runs:runs_page", "list"),
    Page("/run", worded("Run"), "live:live_page"),
    Page("/new", worded("New run"), "new_run:new_run_page", "add_circle_outline"),
    Page("/compare", worded("Compare"), "compare:compare_page", "compare_arrows"),
    Page("/talk", worded("Talk"), "talk:talk_page", "chat_bubble_outline", of_run=True),
    Page("/exams", worded("Exams"), "exams:exams_page", "fact_check", of_run=True),
    Page("/data", worded("Data"), "data:data_page", "dataset", of_run=True),
    Page("/export", worded("Export"), "export:export_page", "ios_share", of_run=True),
)

_UNKNOWN = Page("", worded("No such page"), "unknown:unknown_page")


def address(path: str, **query: str) -> str:
    """The address of a page with parameters, for links and `ui.navigate.to`."""
    return f"{path}?{urlencode(query)}" if query else path


def register(projects: Projects) -> None:
    """Make all pages known to NiceGUI."""
    style = files(__package__).joinpath("studio.css").read_text(encoding="utf-8")
    ui.add_head_html(f"<style>{style}</style>", shared=True)  # `ui.add_css` needs an inline script
    for page in PAGES:
        _Route(page.path, projects)(_shown(page, projects))
    _Route("/{unknown:path}", projects)(_shown(_UNKNOWN, projects))


class _Route(Route):
    """A route whose language and theme are those of the browser that asks."""

    def __init__(self, path: str, projects: Projects) -> None:
        super().__init__(path, response_timeout=30)
        self._projects = projects

    def resolve_language(self) -> Any:
        """Of Quasar's own texts, and of the page for screen readers."""
        return "zh-CN" if _language(self._projects) == "zh" else "en-US"

    def resolve_dark(self) -> bool | None:
        """As chosen on the page, else as the system is (None)."""
        return {"dark": True, "light": False}.get(ASKING.get().cookies.get(THEME_COOKIE, ""))


def _language(projects: Projects) -> Language:
    asking = ASKING.get()
    return language_of(asking.cookies, asking.languages, projects.language)


def _shown(page: Page, projects: Projects) -> Callable[[Request], Any]:
    """The function that NiceGUI calls for a visit."""

    async def show(request: Request) -> None:
        studio = Studio(projects, dict(request.query_params), _language(projects))
        title = studio.say(page.title)
        ui.page_title(f"{title} · mlx-zh")
        _frame(studio, page)
        context.client.on_exception(lambda error: _tell(studio, error))
        try:
            drawn = _builder(page.builder)(studio)
            if inspect.isawaitable(drawn):
                await drawn
        except Exception as error:
            widgets.error_card(studio, _message(error))

    return show


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, MlxZhError) else crashes.record_crash(error)


def _tell(studio: Studio, error: Exception) -> None:
    """Show an error that came up after the page was drawn, such as that of a button."""
    ui.notify(studio.error(_message(error)), type="negative", multi_line=True, timeout=0, close_button="OK")


@cache
def _builder(name: str) -> Callable[[Studio], Any]:
    module, _, function = name.partition(":")
    builder: Callable[[Studio], Any] = getattr(import_module(f"{__package__}.pages.{module}"), function)
    return builder


def _frame(studio: Studio, current: Page) -> None:
    """Header and navigation; on a narrow screen the navigation opens with a button."""
    ui.colors(primary=widgets.COLOURS[0])
    with ui.element("nav").classes("z-drawer"):
        for page in PAGES:
            if page.icon:
                _navigation_link(studio, page, current)
    with ui.header(wrap=False, elevated=False).classes("z-header"):
        menu = ui.button(icon="menu").props("flat dense round color=grey").classes("z-menu")
        menu.props["aria-label"] = studio.say("Menu")
        menu.on("click", js_handler="() => document.body.classList.toggle('z-open')")
        with ui.element("a").props('href="/"').classes("z-brand"):
            ui.label("mlx-zh")
        ui.label(" · ".join(hide(str(folder)) for folder in studio.folders)).classes("z-where")
        other = "en" if studio.language == "zh" else "zh"
        language = ui.button("English" if other == "en" else "中文").props("flat dense no-caps color=grey")
        language.on("click", js_handler=_SET_LANGUAGE.format(cookie=LANGUAGE_COOKIE, language=other))
        theme = ui.button(icon="contrast").props("flat dense round color=grey")
        theme.props["aria-label"] = studio.say("Light or dark")
        theme.on("click", js_handler=_SET_THEME.format(cookie=THEME_COOKIE))


_COOKIE = "; path=/; max-age=31536000; samesite=strict"
_SET_LANGUAGE = "() => {{ document.cookie = '{cookie}={language}" + _COOKIE + "'; location.reload(); }}"
_SET_THEME = (
    "() => {{ const dark = !document.body.classList.contains('body--dark'); Quasar.Dark.set(dark); "
    "document.cookie = '{cookie}=' + (dark ? 'dark' : 'light') + '" + _COOKIE + "'; }}"
)


def _navigation_link(studio: Studio, page: Page, current: Page) -> None:
    run = studio.query.get("run")
    target = address(page.path, run=run) if run and page.of_run else page.path
    with ui.element("a").classes("z-nav") as link:
        link.props["href"] = target
        ui.icon(page.icon).props("aria-hidden=true")
        ui.label(studio.say(page.title))
    if page.path == current.path or (page.path == "/" and current.path == "/run"):
        link.props('aria-current="page"')
