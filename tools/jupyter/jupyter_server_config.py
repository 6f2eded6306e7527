"""For `make lab`: chapters open unmodified, whatever version of Python runs them.

A kernel tells JupyterLab its version, which JupyterLab writes into the notebook. Stored notebooks
have no version; so they are given the present one as they are read, and nothing is left to write.
"""

import platform

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager


class Chapters(AsyncLargeFileManager):
    async def get(self, *args, **kwargs):
        model = await super().get(*args, **kwargs)
        if model["type"] == "notebook" and model["content"]:
            language = model["content"]["metadata"].get("language_info")
            if language and language.get("name") == "python":
                language["version"] = platform.python_version()
        return model


get_config().ServerApp.contents_manager_class = Chapters  # noqa: F821 (Jupyter gives it)
