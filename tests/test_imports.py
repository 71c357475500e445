"""The house: no circles of imports, few floors, stages apart."""

import imports

STAGES = {"config", "prepare", "train", "test", "fuse"}


def test_modules_import_without_circles() -> None:
    assert imports.circles(imports.read_imports()) == []


def test_rooms_stand_on_few_floors() -> None:
    rooms = imports.between_rooms(imports.read_imports())
    assert imports.circles(rooms) == []
    assert max(imports.floors(rooms).values()) <= imports.MOST_FLOORS


def test_stages_import_only_each_others_results() -> None:
    for module, imported in imports.read_imports().items():
        if imports.room(module) in STAGES:
            others = {
                name
                for name in imported
                if imports.room(name) in STAGES - {imports.room(module), "config"}
            }
            assert others <= {"athanor.prepare.result", "athanor.train.result"}, module
