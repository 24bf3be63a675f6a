"""fluidopt: a fluid-model optimization toolkit for prefill-decode contention in LLM serving fleets.

``import fluidopt as fo``; every public name is listed in ``__init__.pyi`` and loaded on first use, so that the import
itself costs next to nothing.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)

__version__ = "0.1.0"
