"""The book: the committed notebooks, the README files and the docstrings as one website (`make book`).

Sphinx reads build/pages, which this file fills with copies of the repository's own files and with
one page per module. Nothing is executed, and the finished pages load nothing from the network.
"""

import inspect
import json
import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
sys.path.insert(0, str(ROOT / ".book"))

import steps  # noqa: E402

import l3paper  # noqa: E402

COPIED = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "l3paper/README.md"]
COPIED += ["notebooks/*.md", "notebooks/*.ipynb", "figures/*.png", "figures/*.gif", "figures/**/*.md"]

MODULES = {
    "The paper": "allocation layer gpt",
    "The lookup": "lookup lookup.reference lookup.grouped lookup.kernels lookup.operators lookup.table "
    "lookup.offload",
    "Hugging Face": "huggingface",
    "Train and generate": "train training.config training.build training.evaluation generate "
    "checkpoints.model checkpoints.run",
    "Data": "data.sources data.tokenizer data.streams data.batches",
    "Costs": "costs.accounting costs.equal",
    "Parts": "parts.optimizer parts.loss parts.cache parts.device",
    "Rivals and variants": "parts.moe parts.rivals parts.variants",
    "Experiments": "experiments.catalogue experiments.search experiments.runs experiments.statistics "
    "experiments.claims",
    "Insight": "insight.lens insight.rows",
}
MODULES = {group: names.split() for group, names in MODULES.items()}

PUBLIC = [getattr(l3paper, name) for name in l3paper.__all__]

CONTENTS = """
```{toctree}
:hidden:
:caption: Notebooks
:glob:
notebooks/README
notebooks/0*
```
```{toctree}
:hidden:
:caption: Package
l3paper/README
api/index
```
```{toctree}
:hidden:
:caption: Project
:glob:
CONTRIBUTING
CHANGELOG
figures/data/*
```
"""

project = "L3: Large Lookup Layers"
author = "the l3paper contributors"
project_copyright = author
version = release = l3paper.__version__
html_title = "L3: Large Lookup Layers"
root_doc = "index"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
copybutton_selector = "div.highlight:not(.stream) > pre"

mathjax_path = "mathjax/tex-chtml.js"

viewcode_follow_imported_members = False
add_module_names = False
toc_object_entries_show_parents = "hide"
default_role = "py:obj"
highlight_language = "none"
autosummary_generate = False
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_static_path = ["static"]
html_favicon = "static/icon.svg"
html_css_files = ["book.css"]
html_js_files = ["scan.js"]
html_theme_options = {
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the sidebar has the search
}
html_context = {"default_mode": "auto"}
# The address of the repository, if it is known: the pages then link to it, to Colab and to Binder.
if repository := os.environ.get("BOOK_REPOSITORY"):
    html_theme_options |= {
        "repository_url": repository,
        "repository_branch": "main",
        "use_repository_button": True,
        "launch_buttons": {
            "colab_url": "https://colab.research.google.com",
            "binderhub_url": "https://mybinder.org",
        },
    }


def write_pages() -> None:
    """Fill build/pages: copies of the repository's own files, and the reference."""
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        page = PAGES / path.relative_to(ROOT)
        page.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, page)
    (PAGES / "README.md").rename(PAGES / "index.md")
    names = {"What `import l3paper` offers": [f"~{each.__module__}.{each.__name__}" for each in PUBLIC]}
    names |= {group: [f"l3paper.{name}" for name in modules] for group, modules in MODULES.items()}
    index = ["# Reference", "", "```{toctree}", ":hidden:", ""]
    index += [f"{name} <{name}>" for modules in MODULES.values() for name in modules]
    for group, lines in names.items():
        index += ["```", "", f"## {group}", "", "```{eval-rst}", ".. autosummary::", ""]
        index += [f"   {line}" for line in lines]
    reference = PAGES / "api"
    reference.mkdir()
    (reference / "index.md").write_text("\n".join([*index, "```", ""]))
    for name in (name for modules in MODULES.values() for name in modules):
        text = f"# l3paper.{name}\n\n```{{eval-rst}}\n.. automodule:: l3paper.{name}\n```\n"
        (reference / f"{name}.md").write_text(text)


def read_page(app, docname: str, source: list[str]) -> None:
    """Turn links to files into links to pages: the README is `index`, code is in the reference."""

    def to_page(link: re.Match) -> str:
        path = os.path.normpath(os.path.join(os.path.dirname(docname), link[1]))
        if path == "README.md":
            return link[0].replace("README.md", "index.md")
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        known = {f"l3paper.{module}" for modules in MODULES.values() for module in modules}
        return f"](#{module}" if module in known else link[0]

    source[0] = re.sub(r"\]\(([\w./]+\.(?:md|py))(?=[#)])", to_page, source[0])
    if docname == "index":
        source[0] += CONTENTS


def insert_scan(app, doctree: nodes.document) -> None:
    """Put the scan to step through behind the animation that it replaces, on the page that has one."""
    for image in list(doctree.findall(nodes.image)):
        if image["uri"].endswith("01_scan.gif"):
            data = json.dumps(steps.scan_data(), separators=(",", ":")).replace("</", "<\\/")
            html = f'<div class="scan" hidden><script type="application/json">{data}</script></div>'
            paragraph = image.parent
            place = paragraph.parent.index(paragraph) + 1
            paragraph.parent.insert(place, nodes.raw("", html, format="html"))


def skip_member(app, what, name: str, obj, skip: bool, options) -> bool | None:
    """Show public functions and methods even if they have no docstring."""
    return False if skip and inspect.isfunction(obj) and not name.startswith("_") else None


def plain_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn our docstrings, which are plain text, into reStructuredText.

    Formulas, drawings and tables become literal blocks, arguments become a list, and signs with a
    meaning in reStructuredText stand for themselves. Sections such as "Args:" are left to napoleon.
    """
    paragraphs = re.split(r"\n{2,}", "\n".join(lines).strip("\n"))
    lines[:] = "\n\n".join([*map(_paragraph, paragraphs), ""]).split("\n")


def _paragraph(text: str) -> str:
    if re.match(r"(Args|Attributes|Returns|Yields):\n", text):
        return text
    if re.match(r"[a-z]\w*: .*\n    ", text):  # arguments, whose further lines are indented
        items = re.sub(r"\n    ", " ", text).split("\n")
        return "\n".join("- ``{}``: {}".format(*_escaped(item).split(": ", 1)) for item in items)
    if re.search(r"^-[- ]+$", text, re.MULTILINE):  # a table
        text = "    " + text.replace("\n", "\n    ")
    prose, *block = re.split(r"^(?=    )", text, maxsplit=1, flags=re.MULTILINE)
    return "\n\n".join([_escaped(prose), *(f"::\n\n{literal}" for literal in block)])


def _escaped(text: str) -> str:
    """With signs for emphasis and references escaped, except between backticks."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*|\\]|_\b)", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts).replace(" .. ", " … ")  # which a summary does not take for its end


def copy_mathjax(app, exception: Exception | None) -> None:
    """Put MathJax beside the pages: what typesets TeX as HTML, without the package's other formats."""
    package = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    for part in ("tex-chtml.js", "input/tex/extensions", "output/chtml/fonts"):
        source, copy = package / part, Path(app.outdir) / "_static" / "mathjax" / part
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True)
        else:
            shutil.copy2(source, copy)


def setup(app) -> None:
    write_pages()
    app.connect("source-read", read_page)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)
    app.connect("doctree-read", insert_scan)
    app.connect("build-finished", copy_mathjax)
