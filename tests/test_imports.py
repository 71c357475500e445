"""The house: no circles of imports, few floors, stages apart."""

import imports

from athanor.code import read_imports, room

STAGES = {"config", "prepare", "train", "test", "fuse"}


def test_modules_import_without_circles() -> None:
    assert imports.circles(read_imports()) == []


def test_rooms_and_modules_stand_on_few_floors() -> None:
    rooms = imports.between_rooms(read_imports())
    assert imports.circles(rooms) == []
    assert max(imports.floors(rooms).values()) <= imports.MOST_FLOORS
    assert max(imports.floors(read_imports()).values()) <= imports.MOST_OF_MODULES


def test_stages_import_only_each_others_results() -> None:
    for module, imported in read_imports().items():
        if room(module) in STAGES:
            others = {name for name in imported if room(name) in STAGES - {room(module), "config"}}
            assert others <= {"athanor.prepare.result", "athanor.train.result"}, module
