"""Register the types of the configuration with every Hydra in this environment, DVC's included.

Hydra imports each module of the namespace package `hydra_plugins` when it starts, and keeps its
plugin classes; this one adds nothing to the search path and exists to be imported.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from athanor.config.experiments import refuse_path_of_cache
from athanor.config.schema import register

register()


class AthanorSchema(SearchPathPlugin):
    """A plugin that makes Hydra import this module."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Leave the search path as it is; refuse an experiment that DVC cannot run."""
        refuse_path_of_cache()
