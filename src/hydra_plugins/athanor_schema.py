"""Tells every Hydra in this environment, DVC's included, what a configuration may hold.

Hydra imports each module of the namespace package `hydra_plugins` when it starts, and keeps the
plugin classes that it finds; this one adds nothing to the search path, its import is the point.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from athanor.config.schema import register

register()


class AthanorSchema(SearchPathPlugin):
    """Exists so that Hydra counts this module as a plugin."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Leaves the search path as it is."""
