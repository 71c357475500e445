"""Altered folders of data: `prepare` succeeds or refuses, in seconds, and runs nothing of them."""

import pytest

from support.altered import check, run_altered


@pytest.mark.altered
def test_no_folder_of_data_breaks_prepare(altered_folders: int) -> None:
    check(run_altered("altered.data_folders", altered_folders))
