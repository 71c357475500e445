"""Altered models: a training begins or is refused, in seconds, and nothing of them is run."""

import pytest

from support.altered import check, run_altered


@pytest.mark.altered
def test_no_folder_of_a_model_breaks_a_training(altered_folders: int) -> None:
    check(run_altered("altered.model_folders", altered_folders))
