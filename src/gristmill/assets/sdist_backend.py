"""Stand-in build backend that answers pip's question for metadata from PKG-INFO.

`pip download` prepares the metadata of a source archive, and that runs its setup.py. We want the file alone and no
foreign code, so pip finds a copy of this module under the name `setuptools.build_meta` (see fetch.py). It runs in
pip's own process with the unpacked archive as working directory, and imports nothing but the standard library.
"""

import email
import shutil
import sys
from pathlib import Path
from typing import Any


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    """Write the .dist-info directory of PEP 517 below `metadata_directory` and return its name."""
    with open("PKG-INFO", encoding="utf-8", errors="replace") as handle:
        headers = email.message_from_file(handle)
    info = Path(metadata_directory, f"{headers['Name'].replace('-', '_')}-{headers['Version']}.dist-info")
    info.mkdir()
    shutil.copyfile("PKG-INFO", info / "METADATA")
    return info.name


# what pip asks for when a source archive has a setup.py and no pyproject.toml
__legacy__ = sys.modules[__name__]
