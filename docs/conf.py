"""Configuration of the documentation: `sphinx-build -W docs docs/_build`.

Nothing is fetched while building. The notebooks (a link to the folder beside this one) and the pages with code are
executed, and an error or anything written to standard error fails the build.
"""

from pathlib import Path

from sphinx.ext.napoleon import GoogleDocstring

import fluidopt

project = "fluidopt"
author = copyright = "The fluidopt developers"
version = release = fluidopt.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_*.md", "**.ipynb_checkpoints"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["fluidopt.css"]
html_title = f"fluidopt {version}"
html_show_sphinx = False
html_copy_source = False

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
math_number_all = False

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_output_stderr = "error"
if not (Path(__file__).resolve().parents[2] / "shared").exists():
    nb_execution_excludepatterns = ["notebooks/05-*"]  # it reads recorded requests beside the repository

# `name` in a docstring is a Python object where there is one of that name, and code otherwise.
default_role = "py:obj"
add_module_names = False
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    "Chunk": "float",
    "Curve": "IterationTime | LinearTime | TabulatedTime",
    "Fitted": "IterationTime | LinearTime | TabulatedTime",
    "Name": "str",
    "NonNegative": "float",
    "NonNegativeInt": "int",
    "Positive": "float",
    "PositiveInt": "int",
    "Seconds": "float",
    "Slope": "float",
    "Tokens": "float",
}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def setup(app):
    """Read the docstrings of attributes and properties like all others.

    Napoleon takes what stands before a colon in their first line for a type, and skips their sections.
    """
    rendered = {}

    def before(app, what, name, obj, options, lines):
        if what in {"attribute", "property"}:
            rendered[name] = GoogleDocstring(list(lines), app.config, app, "method", name, obj, options).lines()

    def after(*event):
        name, lines = event[2], event[-1]
        if name in rendered:
            lines[:] = rendered.pop(name)

    app.connect("autodoc-process-docstring", before, priority=400)
    app.connect("autodoc-process-docstring", after, priority=600)
